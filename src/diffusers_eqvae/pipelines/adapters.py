"""LoRA of a pipeline's transformer, by the names and files of diffusers."""

from __future__ import annotations

from typing import Any


class AdapterMixin:
    """Loads, fuses and unloads adapters of `transformer`, as the pipelines of diffusers do.

    Not one of diffusers' own mixins, which import peft and transformers with the pipeline.
    """

    transformer: Any

    def load_lora_weights(self, source: Any, adapter_name: str | None = None, **kwargs: Any) -> None:
        """Puts adapters on the transformer, which samples with them from now on.

        Args:
            source: a directory, a file, a Hub repository (with `subfolder` and `weight_name`), or a state dict, in
                diffusers' layout (transformer.*.lora_A.weight), as train_transformer writes lora/.
            adapter_name: to tell several apart.

        Raises:
            ValueError: a file that is not of adapters, or not of this transformer.

        Example:
            >>> pipeline.load_lora_weights("runs/sit-lora/lora")
        """
        from diffusers.loaders import SanaLoraLoaderMixin

        state, metadata = SanaLoraLoaderMixin.lora_state_dict(source, return_lora_metadata=True, **kwargs)
        if not state or not all(key.startswith("transformer.") and "lora" in key for key in state):
            raise ValueError(
                f"{source if isinstance(source, str) else 'The file'} does not hold adapters of a transformer "
                f"(transformer.*.lora_A.weight); it holds {', '.join(list(state)[:3]) or 'nothing'}. Name lora/ of a "
                "run of train_transformer."
            )
        self.transformer.load_lora_adapter(state, adapter_name=adapter_name, metadata=metadata, _pipeline=self)
        self.transformer.train(self.transformer.training)  # new layers begin in training, with their dropout

    def fuse_lora(self, lora_scale: float = 1.0, adapter_names: list[str] | None = None) -> None:
        """Adds the adapters, `lora_scale` times, to the transformer's weights: the same function in fewer products."""
        self.transformer.fuse_lora(lora_scale, adapter_names=adapter_names)

    def unfuse_lora(self) -> None:
        """Takes them off the weights again."""
        self.transformer.unfuse_lora()

    def unload_lora_weights(self) -> None:
        """Removes the adapters; where they were fused, their sum stays in the weights."""
        self.transformer.unload_lora()
