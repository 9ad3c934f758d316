# The language model on NVIDIA GPUs (sm_90): torch, Triton, mamba-ssm and causal-conv1d, the last two from their sources.
#
# CUDA comes from the wheels that torch itself requires, compiler included, under the hashes of lm.lock and cuda-build.lock:
# no CUDA image is needed, nothing is in the image twice, and all of this can be built where no image registry is reached.
# The driver comes from the host (NVIDIA's container toolkit).
#
#   BASE        python:3.11-slim-bookworm, the official Python 3.11 on Debian 12 without compilers. Give a build argument to
#               use another Debian 12 that has python3.11 with venv and its headers.
#   APT_MIRROR  an archive of Debian, as the URL before /debian and /debian-security: for builds after a version in
#               debian-toolchain.txt has left the ordinary one.
#   PIP_FLAGS   index options of pip and uv
#   PIP_CERT, SSL_CERT_FILE   certificates for pip and for uv, where the system's are not the right ones
#   MAX_JOBS    files that compile at a time; each takes about 3 GB of memory
ARG BASE=python:3.11-slim-bookworm@sha256:528257d48c1da0dcecc2e725d1ae34498d60c965f1241e39cd6a85a8859bdf84

# C and C++ compilers, for the sources below and, in the final image, for the launchers that Triton compiles at run time.
FROM ${BASE} AS environment
ARG APT_MIRROR=""
COPY containers/locks/debian-toolchain.txt containers/install_debian.sh /locks/
RUN ["sh", "/locks/install_debian.sh", "/locks/debian-toolchain.txt"]
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
COPY containers/locks/installer.lock containers/locks/lm.lock containers/finish_python.sh /locks/
# Everything but the two packages that compile: torch has to be here before their build begins.
# `===`: a folder among PIP_FLAGS may hold torch's CPU build, whose version (+cpu) satisfies `==` and sorts higher.
RUN python3.11 -m venv /tmp/installer && \
    /tmp/installer/bin/pip install -q ${PIP_FLAGS} --disable-pip-version-check --no-cache-dir --no-deps --require-hashes \
        --only-binary :all: -r /locks/installer.lock && \
    sed -n '/^\(mamba-ssm\|causal-conv1d\)==/,/[^\\]$/p' /locks/lm.lock > /locks/sources.lock && \
    sed -e '/^\(mamba-ssm\|causal-conv1d\)==/,/[^\\]$/d' -e 's/^torch==/torch===/' /locks/lm.lock > /locks/wheels.lock && \
    python3.11 -m venv --without-pip /opt/venv && \
    /tmp/installer/bin/uv pip install -q ${PIP_FLAGS} --no-deps --require-hashes --only-binary :all: -r /locks/wheels.lock && \
    sh /locks/finish_python.sh

# The two packages, compiled beside that environment with the CUDA compiler, which no image needs.
FROM environment AS sources
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
ARG MAX_JOBS=2
COPY containers/locks/cuda-build.lock containers/nvcc_sm90.py /locks/
RUN python3.11 -m venv /tmp/installer && \
    /tmp/installer/bin/pip install -q ${PIP_FLAGS} --disable-pip-version-check --no-cache-dir --no-deps --require-hashes \
        --only-binary :all: -r /locks/installer.lock && \
    /tmp/installer/bin/uv pip install -q ${PIP_FLAGS} --no-deps --require-hashes --only-binary :all: -r /locks/cuda-build.lock
# FORCE_BUILD: otherwise their setup.py fetches a ready wheel from a release page.
ENV CUDA_HOME=/opt/venv/lib/python3.11/site-packages/nvidia/cu13 PYTORCH_NVCC=/locks/nvcc_sm90.py \
    MAMBA_FORCE_BUILD=TRUE CAUSAL_CONV1D_FORCE_BUILD=TRUE TORCH_CUDA_ARCH_LIST=9.0
# What a toolkit folder has and the wheels lay out otherwise: lib64, and libraries without a version in their name.
RUN ln -s lib ${CUDA_HOME}/lib64 && \
    for library in ${CUDA_HOME}/lib/*.so.[0-9]*; do ln -sf "$(basename "${library}")" "${library%%.so.*}.so"; done
RUN PATH=/opt/venv/bin:${CUDA_HOME}/bin:${PATH} MAX_JOBS=${MAX_JOBS} /tmp/installer/bin/uv pip install ${PIP_FLAGS} --no-deps \
        --require-hashes --no-build-isolation --no-binary :all: -r /locks/sources.lock --target /compiled && \
    sh /locks/finish_python.sh /compiled

FROM environment
COPY --from=sources /compiled/ /opt/venv/lib/python3.11/site-packages/
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
