"""The command line: one short module for each command, which calls the library function of the same name."""
