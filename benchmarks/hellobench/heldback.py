"""Images beside the paper's, on which nothing was tuned: what a change is worth where nobody looked.

Their programs load much: numerical libraries with hundreds of shared objects and modules, and R with its packages.
Tomcat, which is held back with them, is one of the paper's (`web`).
"""

from __future__ import annotations

from benchmarks.hellobench.steps import application, command, install
from benchmarks.hellobench.workloads import HELD_BACK, LANGUAGE, Output, Workload

READY = "ready"

SCIENCE = """\
import io

import matplotlib

matplotlib.use("Agg")
import numpy as np
import pandas as pd
from matplotlib import pyplot
from scipy import optimize, stats

x = np.linspace(0, 1, 200)
table = pd.DataFrame({"x": x, "y": np.exp(-x)})
found, _ = optimize.curve_fit(lambda x, a, b: a * np.exp(-b * x), table.x, table.y)
slope = stats.linregress(table.x, np.log(table.y)).slope
figure, axes = pyplot.subplots()
axes.plot(table.x, table.y)
figure.savefig(io.BytesIO(), format="png")
assert np.allclose(found, 1) and abs(slope + 1) < 1e-6
print("ready", flush=True)
"""

STATISTICS = """\
library(MASS)
library(lattice)
library(nlme)
fit <- lm(mpg ~ wt + hp, data = mtcars)
robust <- rlm(mpg ~ wt + hp, data = mtcars)
pdf(NULL)
print(xyplot(mpg ~ wt, data = mtcars))
stopifnot(all(is.finite(c(coef(fit), coef(robust)))))
cat("ready\\n")
"""

WORKLOADS = (
    Workload(
        "science",
        LANGUAGE,
        Output(READY),
        f"""{install("python3", "python3-pip", "python3-venv")}
{install("gcc", "g++", "gfortran")}
{install("python3-numpy")}
{install("python3-scipy", "python3-pandas")}
{install("python3-matplotlib")}
ENV LANG=C.UTF-8 MPLCONFIGDIR=/tmp/matplotlib OPENBLAS_NUM_THREADS=1
LABEL org.opencontainers.image.title=science
{application("start.py")}
{command("python3", "/app/start.py")}""",
        kind=HELD_BACK,
        files={"start.py": SCIENCE},
        deadline_s=120.0,
    ),
    Workload(
        "rstat",
        LANGUAGE,
        Output(READY),
        f"""{install("gcc", "g++", "gfortran")}
{install("r-base-core")}
{install("r-recommended")}
ENV LANG=C.UTF-8
LABEL org.opencontainers.image.title=rstat
{application("start.R")}
{command("Rscript", "/app/start.R")}""",
        kind=HELD_BACK,
        files={"start.R": STATISTICS},
        deadline_s=120.0,
    ),
)
