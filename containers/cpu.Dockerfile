# Everything on the CPU, for tests and for evaluation anywhere: both learners, CoinRun, the tests.
#
#   BASE       python:3.11-slim-bookworm, the official Python 3.11 on Debian 12 without compilers. Give a build argument to
#              use another image that has python3.11 with venv.
#   PIP_FLAGS  more flags for pip. cpu.lock pins torch's CPU build (2.13.0+cpu), which the ordinary package index does not
#              hold: name the index or folder that does, unless pip's own configuration already does.
ARG BASE=python:3.11-slim-bookworm@sha256:528257d48c1da0dcecc2e725d1ae34498d60c965f1241e39cd6a85a8859bdf84

FROM ${BASE} AS environment
ARG PIP_FLAGS=""
# One seed for the order of sets: compiled files are then the same in every build.
ENV PYTHONHASHSEED=0 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN ["python3.11", "-m", "venv", "/opt/pip"]
RUN ["python3.11", "-m", "venv", "--without-pip", "/opt/venv"]
COPY containers/locks/build.lock containers/locks/cpu.lock /locks/
# build.lock first: the source distributions in cpu.lock (gym) build with its setuptools.
RUN /opt/pip/bin/pip --python /opt/venv/bin/python install -q ${PIP_FLAGS} --no-compile --no-deps --require-hashes \
        -r /locks/build.lock && \
    /opt/pip/bin/pip --python /opt/venv/bin/python install -q ${PIP_FLAGS} --no-compile --no-deps --require-hashes \
        --no-build-isolation -r /locks/cpu.lock
# Compiled by hash, not by date, so that two builds agree; but for what another Python's syntax needs.
RUN /opt/venv/bin/python -m compileall -q -j 0 --invalidation-mode unchecked-hash -x 'py312_intrinsics' /opt/venv/lib

FROM ${BASE}
COPY --from=environment /opt/venv /opt/venv
# What procgen's library is linked to, at locked versions. APT_MIRROR: see containers/README.md.
ARG APT_MIRROR=""
COPY containers/locks/debian-coinrun.txt containers/install_debian.sh /locks/
RUN ["sh", "/locks/install_debian.sh", "/locks/debian-coinrun.txt"]
COPY . /golf
RUN PYTHONHASHSEED=0 /opt/venv/bin/python -m compileall -q --invalidation-mode unchecked-hash /golf && \
    /opt/venv/bin/python /golf/containers/manifest.py /opt/venv /golf > /tmp/image.manifest && \
    mv /tmp/image.manifest /golf/image.manifest
# Caches go to /tmp, the only place beside the mounted /out that can be written. A user without an entry in /etc/passwd
# needs a name in USER.
ENV PATH=/opt/venv/bin:/usr/local/bin:/usr/bin:/bin PYTHONPATH=/golf PYTHONDONTWRITEBYTECODE=1 \
    HOME=/tmp USER=golf LOGNAME=golf XDG_CACHE_HOME=/tmp/.cache HYPOTHESIS_STORAGE_DIRECTORY=/tmp/.hypothesis
WORKDIR /out
USER 10001:10001
ENTRYPOINT ["/opt/venv/bin/python", "/golf/containers/entrypoint.py"]
CMD ["help"]
