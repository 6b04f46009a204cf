# The whole service on a CPU: the gateway, the Triton of the wheel, and the committed models.
#   docker build --tag labelmint .
#   docker run --rm --publish 8080:8080 --publish 50051:50051 --shm-size 512m labelmint
FROM debian:bookworm-slim AS build
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3-venv=3.11.2-1+b1 \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv /opt/pip \
    && python3 -m venv --without-pip /opt/labelmint
WORKDIR /source
COPY pyproject.toml README.md LICENSE requirements.lock ./
COPY service service
RUN /opt/pip/bin/pip --python /opt/labelmint/bin/python install --no-cache-dir --prefer-binary \
    --constraint requirements.lock '.[calibrate,docs,tracing,triton]' \
    && find /opt/labelmint -type d -name tests -prune -exec rm -r '{}' +

FROM debian:bookworm-slim
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3=3.11.2-1+b1 \
    && rm -rf /var/lib/apt/lists/*
# Fonts for class and keypoint names in pictures, in any script. Triton's Python backend loads libpython.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends \
        fonts-dejavu-core=2.37-6 fonts-unifont=1:15.0.01-2 'libpython3.11=3.11.2-*' \
    && rm -rf /var/lib/apt/lists/*
COPY --from=build /opt/labelmint /opt/labelmint
COPY model_repository /model_repository
# In a container, another address than 0.0.0.0 could not be reached from outside. Who may reach it, `docker run` decides.
ENV PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 \
    LABELMINT_HOST=0.0.0.0 LABELMINT_INSECURE=true LABELMINT_MODEL_REPOSITORY=/model_repository
USER 10001:10001
EXPOSE 8080 50051
ENTRYPOINT ["/opt/labelmint/bin/labelmint"]
CMD ["serve"]
