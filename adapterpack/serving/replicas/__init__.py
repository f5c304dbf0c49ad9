"""One address before several servers of the same bundle: requests for one adapter go to one of them, as long as it is there."""
