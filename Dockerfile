# A model behind serve.py: see "Serving" in docs/running.md
FROM python:3.12-slim
WORKDIR /app
COPY requirements.txt .
# 2.13.0+cpu counts as later than 2.13.0: torch comes without the gigabytes of CUDA
RUN pip install --no-cache-dir --extra-index-url https://download.pytorch.org/whl/cpu -r requirements.txt
COPY *.py serve.html ./
RUN useradd --create-home flatgpt
USER flatgpt
EXPOSE 8000
ENTRYPOINT ["sh", "-c", "exec python serve.py --host=0.0.0.0 --api_key=\"$API_KEY\" \"$@\"", "serve.py"]
