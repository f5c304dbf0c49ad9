"""What every adapter method is made of: the Method value, the normal form, operators and layer layouts."""
