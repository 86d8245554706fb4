"""A run, and what one does with it."""

import signal
import sys

# While `python -m train.COMMAND` imports its libraries, for seconds, Ctrl-C ends it without a
# traceback; `interrupt` then hears signals. Python calls the command "-m" until it has found it.
if sys.argv[:1] == ["-m"] and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
  signal.signal(signal.SIGINT, signal.SIG_DFL)
