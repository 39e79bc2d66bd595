# The page of `asdm app`, on the CPU. docs/app.md says how to build and run it.
FROM python:3.11-slim

# Other indexes of packages, as pip's own variables. Torch's wheels for CPUs alone are smaller than the default ones.
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL

WORKDIR /opt/asdm
COPY pyproject.toml constraints.txt README.md LICENSE NOTICE ./
COPY src ./src
RUN pip install --no-cache-dir -c constraints.txt ".[web,lora]"

# Results to look at, and models, are mounted at /runs. The page writes nothing there.
RUN useradd --create-home asdm && mkdir /runs
USER asdm
WORKDIR /runs

EXPOSE 7860
# Inside a container the loopback address reaches nobody.
ENTRYPOINT ["asdm", "app", "--host", "0.0.0.0"]
CMD ["--folder", "/runs"]
