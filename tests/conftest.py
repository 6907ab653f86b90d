"""What holds for all tests."""

import signal

# `make test &` in a script starts this ignoring Ctrl-C, which everything started here would inherit.
signal.signal(signal.SIGINT, signal.default_int_handler)
