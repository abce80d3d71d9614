"""A worker of the benchmark that misbehaves on request; light, because it is started anew each time."""

import os
import time


def serve(connection):
    while True:
        (kind,) = connection.recv()
        if kind == "hang":
            time.sleep(60)
        if kind == "crash":
            os.abort()
        connection.send((kind != "raise", os.getpid() if kind != "raise" else "ValueError: no"))
