# The world model on NVIDIA GPUs: JAX with CUDA 13 from wheels (worldmodel.lock), Flax, Grain, CoinRun. The driver comes from
# the host (NVIDIA's container toolkit).
#
#   BASE        python:3.11-slim-bookworm, the official Python 3.11 on Debian 12 without compilers. Give a build argument to
#               use another image that has python3.11 with venv.
#   PIP_FLAGS   index options of pip and uv
#   PIP_CERT, SSL_CERT_FILE   certificates for pip and for uv, where the system's are not the right ones
ARG BASE=python:3.11-slim-bookworm@sha256:528257d48c1da0dcecc2e725d1ae34498d60c965f1241e39cd6a85a8859bdf84

FROM ${BASE}
# What procgen's library is linked to, at locked versions. APT_MIRROR: see containers/README.md.
ARG APT_MIRROR=""
COPY containers/locks/debian-coinrun.txt containers/install_debian.sh /locks/
RUN ["sh", "/locks/install_debian.sh", "/locks/debian-coinrun.txt"]
ARG PIP_FLAGS=""
ARG PIP_CERT
ARG SSL_CERT_FILE
# Hashes decide what is installed, so any index may serve it. One build at a time; nothing stays but what is installed. What
# builds from sources orders its sets alike every time, and leaves no compiled files with dates in them.
ARG UV_PYTHON=/opt/venv/bin/python
ARG UV_INDEX_STRATEGY=unsafe-best-match
ARG UV_NO_CACHE=1
ARG UV_CONCURRENT_BUILDS=1
ARG UV_HTTP_TIMEOUT=180
ARG PYTHONHASHSEED=0
ARG PYTHONDONTWRITEBYTECODE=1
COPY containers/locks/installer.lock containers/locks/build.lock \
    containers/locks/worldmodel.lock containers/finish_python.sh /locks/
# build.lock is only for gym, which comes as sources: nothing that runs needs setuptools.
RUN python3.11 -m venv /tmp/installer && \
    /tmp/installer/bin/pip install -q ${PIP_FLAGS} --disable-pip-version-check --no-cache-dir --no-deps --require-hashes \
        --only-binary :all: -r /locks/installer.lock && \
    python3.11 -m venv --without-pip /opt/venv && \
    /tmp/installer/bin/uv pip install -q ${PIP_FLAGS} --no-deps --require-hashes -r /locks/build.lock && \
    /tmp/installer/bin/uv pip install -q ${PIP_FLAGS} --no-deps --require-hashes --no-build-isolation -r /locks/worldmodel.lock && \
    /tmp/installer/bin/uv pip uninstall -q setuptools && \
    sh /locks/finish_python.sh
COPY . /golf
RUN PYTHONHASHSEED=0 /opt/venv/bin/python -m compileall -q --invalidation-mode unchecked-hash /golf && \
    /opt/venv/bin/python /golf/containers/manifest.py /opt/venv /golf > /tmp/image.manifest && \
    mv /tmp/image.manifest /golf/image.manifest
# Caches go to /tmp, the only place beside the mounted /out that can be written. A user without an entry in /etc/passwd
# needs a name in USER.
# NVIDIA_*: what the container toolkit gives to the container, GPUs and the driver's libraries and nvidia-smi.
ENV PATH=/opt/venv/bin:/usr/local/bin:/usr/bin:/bin PYTHONPATH=/golf PYTHONDONTWRITEBYTECODE=1 \
    HOME=/tmp USER=golf LOGNAME=golf XDG_CACHE_HOME=/tmp/.cache HYPOTHESIS_STORAGE_DIRECTORY=/tmp/.hypothesis \
    NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
WORKDIR /out
USER 10001:10001
ENTRYPOINT ["/opt/venv/bin/python", "/golf/containers/entrypoint.py"]
CMD ["help"]
