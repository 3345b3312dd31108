# A container with every command. Not built by this package's authors, who had no engine at hand.
#
#     docker build -t eqvae .
#     docker run --rm --gpus all -v "$PWD/runs:/home/eqvae/runs" -v "$PWD/images:/data:ro" eqvae \
#         train-autoencoder --pretrained_model_name_or_path stabilityai/sd-vae-ft-mse --train_data_dir /data \
#         --output_dir runs/eq-vae
FROM python:3.11-slim

COPY . /opt/eqvae
RUN pip install --no-cache-dir "/opt/eqvae[train,eval,ode]" -c /opt/eqvae/constraints.txt \
    && useradd --create-home eqvae

USER eqvae
WORKDIR /home/eqvae
ENTRYPOINT ["eqvae"]
CMD ["--help"]
