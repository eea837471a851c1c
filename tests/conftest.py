"""Ctrl-C is tested too, also where the tests were started in the background: processes begin deaf to it there."""

import signal

signal.signal(signal.SIGINT, signal.default_int_handler)
