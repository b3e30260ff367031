"""Lines of Containerfiles that several workloads have."""

from __future__ import annotations

import json


def install(*packages: str) -> str:
    """A layer with packages and what they need. No lists and archives stay: they are mounted while it is built."""
    return f"RUN apt-get install -y {' '.join(packages)}"


def command(*words: str) -> str:
    return f"CMD {json.dumps(words)}"


def shell(script: str) -> str:
    return command("sh", "-c", script)


def application(*files: str) -> str:
    """The last layer with data: sources or settings in /app, where the image starts."""
    return f"WORKDIR /app\nCOPY {' '.join(files)} /app/"


# Servers in Java have the runtime as a layer of its own, as those on Docker Hub.
JAVA_RUNTIME = install("openjdk-17-jre-headless")
