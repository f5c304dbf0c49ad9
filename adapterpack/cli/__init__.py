"""The command line: one short file a command, each the library function of the same name."""
