# The model repository, which an init container copies. Build it from the root of the repository:
#   docker buildx build --push --file k8s/images/models.Dockerfile --tag REGISTRY/labelmint/models .
FROM busybox:1.37.0@sha256:9db7b59979c38555a39def84a31fb98b5296952f9e3afd4f6f11f05b07adfab0
COPY model_repository /model_repository
USER 1000:1000
