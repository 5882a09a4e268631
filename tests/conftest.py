"""Makes the helper modules of this folder importable (`import live`) from every test below it."""

import signal

# Whoever runs the tests in the background may have these ignored; the programs under test would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
