"""Train a model in a random subspace: theta = theta_0 + P theta_d. Notebook 06 writes the module inline.

Method: Li et al. 2018, "Measuring the intrinsic dimension of objective landscapes" (arXiv:1804.08838, section 2).

    D  parameters that would be trained      d  dimensions of the subspace, and all that is trained
"""

import hashlib
from collections.abc import Callable
from pathlib import Path

import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.func import functional_call

from workshop_utils.projections import make_projection

FORMAT = "workshop_utils.subspace 1"


class RandomSubspace(nn.Module):
    """`module`, moved along d random directions: theta_d [d] is the one nn.Parameter, zeros at first.

    All parameters of `module` that require a gradient are projected together; those that are frozen stay as they are, so
    a subspace of LoRA's factors is RandomSubspace(apply_lora(...), d). `module` is changed in place: its parameters
    become buffers and hold theta_0. Its own buffers (batch normalisation) are updated as ever. `state_dict` holds
    theta_d and the module's own buffers; neither P nor theta_0, which come from their seeds.

    layer_scales=True is SAID (Aghajanyan et al. 2020, arXiv:2012.13255, section 3.2) with a scale for each parameter
    tensor: the last of the d numbers are what the scales lie above 1, one for each tensor.

    Raises ValueError unless 1 <= d <= D, or if layer_scales leaves nothing of d for the directions.
    """

    def __init__(
        self,
        module: nn.Module,
        d: int,
        *,
        projection: str = "sparse",
        seed: int = 0,
        layer_scales: bool = False,
    ):
        super().__init__()
        names_of = _parameters_by_tensor(module)
        trained = [(tensor, names) for tensor, names in names_of if tensor.requires_grad]
        if not trained:
            raise ValueError("no parameter of the module requires a gradient, so there is nothing to project")
        self.names = [names for _, names in trained]
        self.shapes = [tensor.shape for tensor, _ in trained]
        self.sizes = [tensor.numel() for tensor, _ in trained]
        self.D, self.d, self.layer_scales = sum(self.sizes), d, layer_scales
        scales = len(trained) if layer_scales else 0
        if layer_scales and d <= scales:
            raise ValueError(f"d must be more than {scales}, the number of layer scales; got {d}")
        self.P = make_projection(projection, self.D, d - scales, seed)
        self.theta_d = nn.Parameter(torch.zeros(d))
        self._base_dtypes = {names[0]: tensor.dtype for tensor, names in names_of}
        for tensor, names in names_of:
            _become_buffer(module, tensor.detach(), names)
        self.module = module
        self.to(trained[0][0].device)

    def forward(self, *args, **kwargs):
        """The module's forward, with its parameters at theta_0 + P theta_d."""
        moved = self._moved()
        weights = {name: tensor for tensor, names in zip(moved, self.names, strict=True) for name in names}
        return functional_call(self.module, weights, args, kwargs, tie_weights=False)

    def theta(self) -> Tensor:
        """All projected parameters as one vector [D], in the order of module.parameters()."""
        return torch.cat([tensor.flatten() for tensor in self._moved()])

    def _moved(self) -> list[Tensor]:
        """theta_0 + P theta_d, tensor by tensor."""
        directions, scales = self.theta_d.split([self.P.d, self.d - self.P.d])
        deltas = self.P(directions).split(self.sizes)
        if self.layer_scales:
            deltas = [delta * (1 + scale) for delta, scale in zip(deltas, scales, strict=True)]
        theta_0 = (self.module.get_buffer(names[0]) for names in self.names)
        return [
            start + delta.view(shape)
            for start, delta, shape in zip(theta_0, deltas, self.shapes, strict=True)
        ]

    def base_sha256(self) -> str:
        """A hash of theta_0 and of what is frozen: names, shapes and values, in the dtypes that the module came with."""
        digest = hashlib.sha256()
        for name, dtype in self._base_dtypes.items():
            tensor = self.module.get_buffer(name).to("cpu", dtype).contiguous()
            digest.update(f"{name} {tuple(tensor.shape)} {dtype}".encode())
            digest.update(tensor.flatten().view(torch.uint8).numpy())
        return digest.hexdigest()

    def extra_repr(self) -> str:
        return f"D={self.D}, d={self.d}, layer_scales={self.layer_scales}"


class SubspaceFileError(RuntimeError):
    """A file cannot be used with this model. The message says what differs."""


def save_subspace(model: RandomSubspace, path: str | Path, *, base_seed: int | None = None) -> None:
    """Write theta_d, the module's own buffers, and what P and theta_0 are made from, as one safetensors file.

    base_seed: the seed that the module was made after, if `load_subspace` shall set it. The hash of theta_0 is kept in
    any case. About 4 d bytes and 600 more.
    """
    about = {
        "format": FORMAT,
        "projection": model.P.kind,
        "D": model.D,
        "d": model.d,
        "seed": model.P.seed,
        "layer_scales": model.layer_scales,
        "fingerprint": model.P.fingerprint,
        "base_sha256": model.base_sha256(),
        "torch": torch.__version__,
    }
    if base_seed is not None:
        about["base_seed"] = base_seed
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, path, metadata={key: str(value) for key, value in about.items()})


def load_subspace(path: str | Path, make_module: Callable[[], nn.Module]) -> RandomSubspace:
    """The model that was saved: make_module() makes its base again, P is drawn again, theta_d is read.

    If the file has a base_seed, make_module is called after torch.manual_seed(base_seed); the state of the random
    numbers is put back. Raises SubspaceFileError if the base is another one (D, hash), or if P comes out
    differently under this torch version.
    """
    about, tensors = _read(path)
    with torch.random.fork_rng(devices=[]):
        if "base_seed" in about:
            torch.manual_seed(int(about["base_seed"]))
        module = make_module()
    D = sum(tensor.numel() for tensor, _ in _parameters_by_tensor(module) if tensor.requires_grad)
    if D != int(about["D"]):
        raise SubspaceFileError(
            f"{path}: D is {int(about['D']):,} in the file, but the module has {D:,} trainable parameters; "
            "make_module must make the same model, with the same parts frozen"
        )
    model = RandomSubspace(
        module,
        int(about["d"]),
        projection=about["projection"],
        seed=int(about["seed"]),
        layer_scales=about["layer_scales"] == "True",
    )
    versions = f"(saved under torch {about['torch']}, this is torch {torch.__version__})"
    if model.base_sha256() != about["base_sha256"]:
        raise SubspaceFileError(
            f"{path}: theta_0 differs from the one that was saved: theta_d means nothing from another start. Make the "
            f"base with the same seed, or load the same weights {versions}"
        )
    if model.P.fingerprint != about["fingerprint"]:
        raise SubspaceFileError(
            f"{path}: seed {about['seed']} gives another P than it did {versions}. Load it under that version"
        )
    model.to(tensors["theta_d"].dtype).load_state_dict(tensors)
    return model


def _read(path: str | Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    if not Path(path).is_file():
        raise SubspaceFileError(f"{path} does not exist")
    try:
        with safetensors.safe_open(path, "pt") as file:
            about, tensors = file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a dict
    except safetensors.SafetensorError as error:
        raise SubspaceFileError(f"{path} is damaged, or not a safetensors file ({error})") from None
    if about.get("format") != FORMAT:
        raise SubspaceFileError(f"{path} was not written by save_subspace of this version")
    return about, tensors


def _parameters_by_tensor(module: nn.Module) -> list[tuple[nn.Parameter, list[str]]]:
    """Each parameter once, with all its names: a tied one has several."""
    names_of: dict[nn.Parameter, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names_of.setdefault(parameter, []).append(name)
    return list(names_of.items())


def _become_buffer(module: nn.Module, tensor: Tensor, names: list[str]) -> None:
    for name in names:
        path, _, last = name.rpartition(".")
        owner = module.get_submodule(path)
        delattr(owner, last)
        owner.register_buffer(last, tensor, persistent=False)
