"""Rules of composition: what each computes and the arithmetic that they share."""
