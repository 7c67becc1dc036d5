"""A stage for tests of `benchmarks.gpu`: writes a row, then ends as its arguments say."""

import os
import signal
import subprocess
import sys
import time

from benchmarks.rows import emit

if __name__ == "__main__":
    ending = sys.argv[1]
    if ending == "hang":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
        emit("said", ending=ending, child=child.pid)
        time.sleep(600)
    emit("said", ending=ending, mark=os.environ["TRITON_CACHE_DIR"])
    print(f"last words of {ending}", flush=True)
    if ending == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if ending == "crash":
        raise RuntimeError("a kernel went wrong")
    if ending == "long":
        for _ in range(300):
            print("x" * 99, flush=True)
