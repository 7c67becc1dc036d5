"""A worker with a child process that outlives it: `python -m tests.launcher.parent [EXIT_CODE]`."""

import subprocess
import sys
import time

subprocess.Popen(["sleep", "600"])
if len(sys.argv) > 1:
    sys.exit(int(sys.argv[1]))
time.sleep(600)
