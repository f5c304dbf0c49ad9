"""The arithmetic of a merge: a change folded into blocks of a weight."""
