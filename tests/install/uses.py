"""A loss with its gradient, and who computed it: run by the interpreter of an environment, prints one line of JSON."""

from __future__ import annotations

# By the reference in float64.
EXPECTED = {"loss": 5.55792694241335, "gradient": 0.31187636635426463}


def main() -> None:
    import importlib.util
    import json

    import torch

    import efe_kernels
    from efe_kernels import info

    logits = torch.sin(torch.arange(2 * 3 * 4 * 5 * 10.0)).reshape(2, 3, 4, 5, 10).requires_grad_()
    target = torch.arange(2 * 4 * 5).reshape(2, 4, 5) % 10
    preference = torch.cos(torch.arange(4 * 5 * 10.0)).reshape(4, 5, 10)
    loss = efe_kernels.efe_loss(logits, target, preference).total
    loss.backward()
    facts = info.facts()
    found = {
        "loss": loss.item(),
        "gradient": logits.grad.norm().item(),
        "backend": facts["ops"]["efe_loss_forward"]["CPU"],
        "file": efe_kernels.__file__,
        "numpy": importlib.util.find_spec("numpy") is not None,
        "cuda torch": torch.version.cuda is not None,
        **{name: facts[name] for name in ("CPU", "triton", "extension", "missing on CUDA")},
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
