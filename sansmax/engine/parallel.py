"""The tokens of one image over several processes: each summarises its own, one sum merges, each maps its own.

    state  = sum over processes of summarise(own tokens)         # one all-reduce per layer, SOFT two
    tokens = map(finish(state), own tokens)

What travels does not grow with the tokens. Per image and layer of c channels, h heads of d = c / h, p processes:

    seqnorm   p (c + 1) + c (c + 1) / 2       counts and means in slots, and the scatter around the own mean
    sima      2 c + c d + h                   l1 norms, K^T V and the count
    soft      m (c + 1) + m c                 sums of m landmarks, then P^T V

numbers of float32, and c + 1 once for the pooling; backward sends as many. There is no attention mathematics here:
states lay themselves out as rows that add up (`sansmax.ops.sums`).

Gradients. Let every process r of the p compute the same loss L_r = L from the same logits. Autograd on rank r gives
the derivative of sum_r' L_r' = p L by what r itself holds: the sum s = sum_r a_r reaches all losses, so
d(p L)/d a_r = sum_r' dL_r'/ds, which is an all-reduce of the gradients of s (`_Sum.backward`). A parameter w has a copy
w_r on each rank, and dL/dw = sum_r dL/dw_r = sum_r (g_r / p) with g_r = d(p L)/dw_r, the gradient on rank r. So the
average of the gradients over the group is the exact one, and the average over data x sequence ranks, which DDP and
FSDP take, is that of the whole batch. Every parameter takes part on every rank, those without tokens included.

Shapes: b images, n own tokens, c channels, p processes.
"""

import copy
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, cast

import torch
import torch.distributed as dist
from timm.layers.drop import DropPath
from timm.layers.patch_dropout import PatchDropout
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.utils.checkpoint import checkpoint

from sansmax.errors import InputError
from sansmax.models.attention_soft import Place
from sansmax.models.blocks import Block
from sansmax.models.ragged import run_ragged, side_by_side, split_weights
from sansmax.models.slide import FeatureNetwork
from sansmax.models.slide_positions import centred_coords
from sansmax.models.vit import VisionTransformer
from sansmax.ops import Mean
from sansmax.ops.moments import Weight, without_padding

Group = dist.ProcessGroup | DeviceMesh | None


class _Sum(torch.autograd.Function):
    """The sum of a tensor over the processes of a group, on each of them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_total: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        by_x = by_total.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(by_x, group=ctx.group)
        return by_x, None


class Members:
    """The processes that share the tokens, and where one's own stand; a `sansmax.models.attention.Others`."""

    def __init__(self, group: Group = None, place: Place | None = None) -> None:
        if not (dist.is_available() and dist.is_initialized()):
            raise InputError(
                "tokens are shared between processes, but there is no group of processes: start with torchrun and call "
                "torch.distributed.init_process_group() first"
            )
        self.group = group.get_group() if isinstance(group, DeviceMesh) else group
        self.rank, self.size = dist.get_rank(self.group), dist.get_world_size(self.group)
        if self.rank < 0:
            raise InputError(f"process {dist.get_rank()} is not a member of the group it was given; give it its own")
        self.place = place

    def at(self, place: Place | None) -> "Members":
        """The same processes, with the place of one's own tokens."""
        other = copy.copy(self)
        other.place = place
        return other

    def whole(self, state: Any) -> Any:
        """The summary of all tokens from that of one's own: one all-reduce."""
        if self.size == 1:
            return state
        row = state.to_sum(self.rank, self.size)
        return state.of_sum(cast(Tensor, _Sum.apply(row, self.group)), self.size)

    def every(self, counts: Tensor) -> Tensor:
        """Counts of all processes, (p, ...): no gradients."""
        slots = counts.new_zeros(self.size, *counts.shape)
        slots[self.rank] = counts
        if self.size > 1:
            dist.all_reduce(slots, group=self.group)
        return slots

    def agree_on_random_numbers(self, device: torch.device) -> None:
        """Lets all members go on with the random numbers of the first one: drop path draws one per image."""
        if self.size == 1:
            return
        generator: Any = torch if device.type == "cpu" else torch.get_device_module(device)
        state = generator.get_rng_state().to(device)
        first = 0 if self.group is None else dist.get_global_rank(self.group, 0)
        dist.broadcast(state, first, group=self.group)
        generator.set_rng_state(state.cpu())


def sequence_mesh(sequence_parallel: int, device_type: str = "cpu") -> DeviceMesh:
    """All processes as a mesh ("data", "sequence"): each row of `sequence_parallel` neighbours shares its images.

    `shard_sequence` takes `mesh["sequence"]`, gradients are averaged over all processes. Raises InputError unless
    `sequence_parallel` divides their number.
    """
    world = Members().size
    if sequence_parallel < 1 or world % sequence_parallel:
        allowed = ", ".join(str(k) for k in range(1, world + 1) if world % k == 0)
        raise InputError(
            f"{world} processes cannot be shared out in groups of {sequence_parallel}; sequence_parallel must be one "
            f"of {allowed}, or start another number of processes"
        )
    shape = (world // sequence_parallel, sequence_parallel)
    return init_device_mesh(device_type, shape, mesh_dim_names=("data", "sequence"))


def shard_sequence(network: nn.Module, group: Group = None, *, local: bool = False) -> "SequenceParallel":
    """`network` with the tokens of each image shared out over the processes of `group` (None: all processes).

    What comes back is called as the network is, with the whole batch, on every process of the group, and gives each the
    same logits; a process embeds and holds its own share of the tokens only. With `local` each process gives its own
    part instead, and no process ever has the whole: features and coordinates of some tokens of a bag, or bands of whole
    rows of patches, in the order of the processes; parts may differ in size, and be empty.

    Parameters are the network's own, under their names; their gradients, averaged over the group, are exact (DDP and
    FSDP average). In training the members go on with the first one's random numbers, for drop path.

    Raises InputError for a network that cannot share its tokens out: softmax, convolutions over tokens, and dropout of
    tokens in training.
    """
    check_shardable(network)
    kind = _SharedBags if isinstance(network, FeatureNetwork) else _SharedImages
    return kind(network, Members(group), local)


def check_shardable(network: nn.Module) -> None:
    """Raises InputError for a network whose tokens cannot be shared out."""
    obstacle = "it is no vision transformer or slide network of this package"
    if isinstance(network, VisionTransformer | FeatureNetwork):
        obstacle = network.stream_obstacle
        # without it timm's patch embedding takes pictures of one size, and a share of one has another
        if isinstance(network, VisionTransformer) and network.patch_embed.strict_img_size:
            obstacle = obstacle or "it was built for one size of images (dynamic_img_size=False)"
    if obstacle is not None:
        raise InputError(
            f"{type(network).__name__} cannot share the tokens of an image out over processes: {obstacle}. Use a "
            "network such as seqnorm_vit_tiny_patch16_224, sima_deit_small_patch16_224 or seqnorm_slide_small, or "
            "parallel.sequence_parallel=1"
        )


def check_trains_shared(network: nn.Module) -> None:
    """Raises InputError for a network that several processes cannot train with the tokens of an image shared out."""
    check_shardable(network)
    check_no_token_randomness(network.train())


def check_no_token_randomness(network: nn.Module) -> None:
    """Raises InputError for parts that draw random numbers for each token: they would depend on the shares."""
    for name, part in network.named_modules():
        rate = part.prob if isinstance(part, PatchDropout) else getattr(part, "p", 0.0)
        if part.training and isinstance(rate, float) and rate > 0 and part is not getattr(network, "head_drop", None):
            raise InputError(
                f"the network drops tokens' channels or tokens at random in training ({name}: rate {rate}), which "
                "would depend on how the tokens are shared out; set proj_drop_rate, pos_drop_rate and patch_drop_rate "
                "to 0 (drop_path_rate and drop_rate may stay), or use parallel.sequence_parallel=1"
            )


def _draws(network: nn.Module) -> bool:
    rates = (part.drop_prob if isinstance(part, DropPath) else getattr(part, "p", 0.0) for part in network.modules())
    return network.training and any(isinstance(rate, float) and rate > 0 for rate in rates)


def share(n: int, part: int, parts: int) -> slice:
    """The tokens of `part` when `n` are shared out as evenly as they go; some parts are empty where n < parts."""
    return slice(n * part // parts, n * (part + 1) // parts)


def sharded_logits(
    network: Any,
    tokens: Tensor,
    members: Members | Group = None,
    *,
    mask: Weight = None,
    lengths: Sequence[int] = (),
) -> Tensor:
    """Logits (b, classes), the same on every process, of images of which each holds its own embedded `tokens`.

    Tokens (b, n, c) are what `network.embed_rows` or `network.embed_tokens` gives, any number of them per process;
    `mask` (b, n) is True for one's own real tokens, or a weight per token. Those of the first process come first, the
    class token before them. With `lengths` the tokens (1, n, c) are parts of several bags side by side; a part may be
    empty. Raises InputError as `shard_sequence` does.
    """
    check_shardable(network)
    check_no_token_randomness(network)
    members = members if isinstance(members, Members) else Members(members)
    if _draws(network):
        members.agree_on_random_numbers(tokens.device)
    prefix = network.embed_prefix()
    count = 0 if prefix is None else prefix.shape[1] * (members.rank == 0)
    x, own = tokens, mask
    if prefix is not None:
        # on the others it is cut to nothing, and takes part with gradients of zero
        x = torch.cat((prefix[:, :count].expand(len(x), -1, -1).to(x.dtype), x), dim=1)
        own = None if mask is None else torch.cat((mask.new_ones(len(x), count), mask), dim=1)
    bags = list(lengths)
    x = _through_blocks(network, x, own, bags, members.at(_place(network, x, own, bags, members)))
    if bags:
        return network.read_out(members.whole(network.summarise_bags(x, mask, bags)))
    pooled = network.summarise_pool(x[:, count:], mask)
    if prefix is not None:
        pooled = pooled.merge(network.summarise_pool(x[:, :count], prefix=True))
    return network.read_out(members.whole(pooled))


def _through_blocks(network: Any, x: Tensor, mask: Weight, bags: list[int], members: Members) -> Tensor:
    again = network.grad_checkpointing and torch.is_grad_enabled()
    for block in network.blocks:
        step: Any = partial(run_ragged, block, lengths=bags) if bags else block
        if again:
            x = cast(Tensor, checkpoint(step, x, mask=mask, others=members, use_reentrant=False))
        else:
            x = step(x, mask=mask, others=members)
    return x


def _place(network: Any, x: Tensor, mask: Weight, bags: list[int], members: Members) -> Place | None:
    """Where the own tokens stand among the real ones: for pooled landmarks, which are stretches of the sequence."""
    if all(cast(Block, block).rounds == 1 for block in network.blocks):
        return None
    real = torch.ones_like(x[..., 0], dtype=torch.bool) if mask is None else mask != 0
    counts = torch.cat([part.sum(1) for part in real.split(bags or [x.shape[1]], dim=1)])
    every = members.every(counts)
    return Place(every[: members.rank].sum(0), every.sum(0))


class SequenceParallel(nn.Module):
    """A network whose tokens are shared out; parameters, buffers and children are the network's own.

    Whatever else is asked of it (`num_classes`, `no_weight_decay`, ...) is what the network says.
    """

    def __init__(self, network: nn.Module, members: Members, local: bool) -> None:
        super().__init__()
        # not as a child, which would give every parameter another name
        self.__dict__["network"] = network
        self.members, self.local = members, local
        self._parameters, self._buffers, self._modules = network._parameters, network._buffers, network._modules
        self._non_persistent_buffers_set = network._non_persistent_buffers_set
        self.training = network.training

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "network" not in self.__dict__:
                raise
            return getattr(self.__dict__["network"], name)

    def __deepcopy__(self, memo: dict[int, Any]) -> "SequenceParallel":
        # a group of processes has no copy
        return type(self)(copy.deepcopy(self.network, memo), self.members, self.local)

    def train(self, mode: bool = True) -> "SequenceParallel":
        """Training or evaluation mode, of the network as well."""
        self.network.train(mode)
        self.training = mode
        return self


class _SharedImages(SequenceParallel):
    """A vision transformer over images of which each process embeds some patches."""

    def forward(self, x: Tensor, mask: Weight = None) -> Tensor:
        """Logits of images (b, in_chans, h, w); with `local`, `x` and `mask` are one's own rows of patches."""
        network, members = cast(VisionTransformer, self.network), self.members
        size = network.patch_embed.patch_size
        if any(n % p for n, p in zip(x.shape[-2:], size, strict=True)):
            what = "parts of images" if self.local else "images"
            raise InputError(
                f"{what} must be whole patches of {size[0]} x {size[1]} pixels, got {x.shape[-2]} x {x.shape[-1]}"
            )
        network.check_mask(x, mask)
        rows, columns = x.shape[-2] // size[0], x.shape[-1] // size[1]
        if not self.local:
            own = share(rows * columns, members.rank, members.size)
            tokens = _patches(network, x, own, 0, (rows, columns))
            return sharded_logits(network, tokens, members, mask=None if mask is None else mask[:, own])
        every = members.every(torch.tensor(rows, device=x.device)).tolist()
        grid, first = (sum(every), columns), sum(every[: members.rank])
        if not grid[0] * columns:
            raise InputError("no process has any patches; an image without tokens has no logits")
        return sharded_logits(network, _patches(network, x, slice(0, rows * columns), first, grid), members, mask=mask)


def _patches(network: Any, x: Tensor, own: slice, first_row: int, grid: tuple[int, int]) -> Tensor:
    """Tokens `own` of the picture `x`, whose first row of patches is number `first_row` of the whole `grid`."""
    height, columns = network.patch_embed.patch_size[0], grid[1]
    top, bottom = own.start // columns, -(-own.stop // columns)
    if own.start == own.stop:
        # an embedding that nobody reads: every parameter and the picture take part on every process. DDP waits for all,
        # and so does backward: a sum over processes is a sum of all of them
        blank = torch.cat((x[:, :, :0], x.new_zeros(*x.shape[:2], height, x.shape[3])), dim=2)
        return network.embed_rows(blank, min(first_row + top, grid[0] - 1), grid)[:, :0]
    tokens = network.embed_rows(x[:, :, top * height : bottom * height], first_row + top, grid)
    return tokens[:, own.start - top * columns : own.stop - top * columns]


class _SharedBags(SequenceParallel):
    """A slide network over bags of which each process embeds some tokens."""

    def forward(
        self,
        features: Tensor,
        coords: Tensor | None = None,
        mask: Weight = None,
        lengths: Sequence[int] | None = None,
    ) -> Tensor:
        """Logits of bags, as `FeatureNetwork.forward`; with `local` all arguments are those of one's own tokens."""
        network, members = cast(FeatureNetwork, self.network), self.members
        if self.local:
            bags = [] if lengths is None else [int(n) for n in lengths]
            if coords is not None:
                coords = self._centred(coords, mask, bags)
            return self._logits(network, features, coords, mask, bags)
        bags = network.check_bags(features, lengths)
        if coords is not None:
            coords = network.centred(coords, mask, bags)
        starts = [sum(bags[:i]) for i in range(len(bags))] or [0]
        shares = [share(n, members.rank, members.size) for n in bags or [features.shape[1]]]
        where = [slice(s.start + first, s.stop + first) for s, first in zip(shares, starts, strict=True)]
        own = [None if x is None else torch.cat([x[:, w] for w in where], dim=1) for x in (features, coords, mask)]
        return self._logits(network, *own, bags=[s.stop - s.start for s in shares] if bags else [])

    def _logits(self, network: FeatureNetwork, features: Any, coords: Any, mask: Any, bags: list[int]) -> Tensor:
        tokens = network.embed_tokens(without_padding(features, mask), coords)
        return sharded_logits(network, tokens, self.members, mask=mask, lengths=bags)

    def _centred(self, coords: Tensor, mask: Weight, bags: list[int]) -> Tensor:
        """Coordinates from the middle of each whole bag."""
        lengths = bags or [coords.shape[1]]
        each: Iterable[Any] = zip(coords.split(lengths, dim=1), split_weights(mask, lengths), strict=True)
        each = [(xy, None if m is None else m != 0, m) for xy, m in each]
        with torch.no_grad():
            mean = self.members.whole(side_by_side([Mean.of(xy.double(), real) for xy, real, _ in each]))
        centres = mean.value().unsqueeze(1).split(1 if bags else len(coords))
        moved = [centred_coords(xy, m, centre) for (xy, _, m), centre in zip(each, centres, strict=True)]
        return torch.cat(moved, dim=1)
