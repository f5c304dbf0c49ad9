"""Rules of composition: the formula of each rule and the arithmetic that the rules share."""
