"""The chunked vocabulary head against plain log_softmax in float64."""

from __future__ import annotations

import weakref
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pact_nemo.policy import microbatches
from pact_nemo.policy.heads import vocab_parallel_logprobs, vocab_parallel_logprobs_and_entropies


def inputs(
    rows: int = 11, hidden: int = 6, vocab: int = 17, padded: int = 20, dtype: torch.dtype = torch.float64
) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(rows, hidden, generator=generator, dtype=dtype).requires_grad_()
    w = torch.randn(padded, hidden, generator=generator, dtype=dtype).requires_grad_()
    return h, w, torch.randint(0, vocab, (rows,), generator=generator)


def reference(h: torch.Tensor, w: torch.Tensor, target: torch.Tensor, vocab: int, temperature: float) -> torch.Tensor:
    return (h @ w[:vocab].t() / temperature).log_softmax(-1).gather(1, target[:, None])[:, 0]


@pytest.mark.parametrize("chunk", [1, 4, 11, 100])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_values_and_gradients_equal_log_softmax_of_the_true_vocabulary(chunk: int, temperature: float) -> None:
    h, w, target = inputs()
    upstream = torch.linspace(-2, 3, 11, dtype=torch.float64)
    ours = vocab_parallel_logprobs(h, w, target, vocab_size=17, chunk=chunk, temperature=temperature)
    grads = torch.autograd.grad((ours * upstream).sum(), (h, w))
    expected = reference(h, w, target, 17, temperature)
    expected_grads = torch.autograd.grad((expected * upstream).sum(), (h, w))
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)
    for got, want in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_gradients_written_in_place_are_the_same(dtype: torch.dtype) -> None:
    h, w, target = (t.detach().to(dtype).requires_grad_() if t.is_floating_point() else t for t in inputs())
    upstream = torch.linspace(-2, 3, 11, dtype=torch.float64)
    plain = (vocab_parallel_logprobs(h, w, target, vocab_size=17, chunk=4) * upstream).sum()
    want_h, want_w = torch.autograd.grad(plain, (h, w))
    main_grad = torch.ones(w.shape, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    gathered = h.index_select(0, torch.arange(11))
    ours = vocab_parallel_logprobs(
        gathered, w, target, vocab_size=17, chunk=4, overwrite_hidden=True, main_grad=main_grad, placeholder=True
    )
    (ours * upstream).sum().backward()
    torch.testing.assert_close(h.grad, want_h, rtol=0, atol=0)
    torch.testing.assert_close(
        (main_grad - 1).to(dtype), want_w, rtol=2e-2, atol=1e-12 if dtype == torch.float64 else 2e-2
    )
    assert w.grad is not None and w.grad.shape == w.shape  # something for hooks; its values mean nothing


def test_a_second_backward_pass_gives_the_same_gradients() -> None:
    h, w, target = inputs()
    ours = vocab_parallel_logprobs(h, w, target, vocab_size=17, chunk=4).sum()
    first = torch.autograd.grad(ours, (h, w), retain_graph=True)  # uses up what the forward pass left of the last chunk
    for got, want in zip(torch.autograd.grad(ours, (h, w)), first, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


def test_hidden_states_that_somebody_else_needs_are_not_overwritten_silently() -> None:
    h, w, target = inputs()
    shared = h * 1.0
    squares = (shared * shared).sum()  # saves ``shared`` for its own backward
    ours = vocab_parallel_logprobs(shared, w, target, vocab_size=17, chunk=4, overwrite_hidden=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (ours.sum() + 0 * squares).backward()


def test_gradcheck() -> None:
    h, w, target = inputs(rows=5, hidden=3, vocab=7, padded=8)
    assert torch.autograd.gradcheck(lambda a, b: vocab_parallel_logprobs(a, b, target, vocab_size=7, chunk=2), (h, w))


def test_large_logits_stay_finite() -> None:
    h, w, target = inputs(dtype=torch.float32)
    ours = vocab_parallel_logprobs(h * 1e4, w, target, vocab_size=17, chunk=4)
    torch.testing.assert_close(ours, reference(h * 1e4, w, target, 17, 1.0), rtol=1e-5, atol=1e-2)
    assert ours.isfinite().all()


def test_bf16_inputs_give_float32_logprobs() -> None:
    h, w, target = (t.detach().bfloat16().requires_grad_() if t.is_floating_point() else t for t in inputs(hidden=32))
    ours = vocab_parallel_logprobs(h, w, target, vocab_size=17, chunk=4)
    assert ours.dtype == torch.float32
    expected = reference(h.double(), w.double(), target, 17, 1.0)
    torch.testing.assert_close(ours.double(), expected, rtol=0, atol=0.1)
    for got, want in zip(
        torch.autograd.grad(ours.sum(), (h, w)), torch.autograd.grad(expected.sum(), (h, w)), strict=True
    ):
        assert got.dtype == torch.bfloat16
        torch.testing.assert_close(got.float(), want.float(), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("chunk", [1, 4, 5, 100])
@pytest.mark.parametrize("per_token", [False, True])
def test_entropies_and_their_gradients_equal_log_softmax_of_the_true_vocabulary(chunk: int, per_token: bool) -> None:
    h, w, target = inputs()
    temperature = torch.linspace(0.5, 2.0, 11, dtype=torch.float64) if per_token else 0.7
    divisor = temperature[:, None] if isinstance(temperature, torch.Tensor) else temperature
    g, e = torch.linspace(-2, 3, 11, dtype=torch.float64), torch.linspace(1, -1.5, 11, dtype=torch.float64)
    logprobs, entropy = vocab_parallel_logprobs_and_entropies(
        h, w, target, vocab_size=17, chunk=chunk, temperature=temperature
    )
    log_p = (h @ w[:17].t() / divisor).log_softmax(-1)
    expected, expected_entropy = log_p.gather(1, target[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)
    assert entropy is not None
    torch.testing.assert_close(logprobs, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(entropy, expected_entropy, rtol=0, atol=1e-12)
    for ours, wanted in (
        ((logprobs * g).sum(), (expected * g).sum()),  # first: it may use what the forward pass left of the last chunk
        ((entropy * e).sum(), (expected_entropy * e).sum()),
        ((logprobs * g + entropy * e).sum(), (expected * g + expected_entropy * e).sum()),
    ):
        got = torch.autograd.grad(ours, (h, w), retain_graph=True)
        for one, other in zip(got, torch.autograd.grad(wanted, (h, w), retain_graph=True), strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def test_gradcheck_of_both_by_finite_differences() -> None:
    h, w, target = inputs(rows=5, hidden=3, vocab=7, padded=8)
    temperature = torch.tensor([1.0, 0.5, 1.0, 2.0, 1.3], dtype=torch.float64)

    def both(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, ...]:
        found = vocab_parallel_logprobs_and_entropies(a, b, target, vocab_size=7, chunk=2, temperature=temperature)
        assert found[1] is not None
        return found[0], found[1]

    assert torch.autograd.gradcheck(both, (h, w))


def test_entropies_change_no_bit_of_log_probs_and_gradients() -> None:
    h, w, target = inputs(dtype=torch.float32)
    plain = vocab_parallel_logprobs(h, w, target, vocab_size=17, chunk=4)
    beside, _ = vocab_parallel_logprobs_and_entropies(h, w, target, vocab_size=17, chunk=4)
    assert torch.equal(plain, beside)
    for got, want in zip(
        torch.autograd.grad(beside.sum(), (h, w)), torch.autograd.grad(plain.sum(), (h, w)), strict=True
    ):
        assert torch.equal(got, want)


def test_entropies_of_extreme_logits_are_finite_and_so_are_their_gradients() -> None:
    h, w, target = inputs(dtype=torch.float32)
    logprobs, entropy = vocab_parallel_logprobs_and_entropies(h * 1e4, w, target, vocab_size=17, chunk=4)
    assert entropy is not None and entropy.isfinite().all() and entropy.min() > -1e-6
    assert all(grad.isfinite().all() for grad in torch.autograd.grad((entropy + logprobs).sum(), (h, w)))


def test_no_scored_rows() -> None:
    h, w, target = inputs(rows=0)
    out = vocab_parallel_logprobs(h, w, target, vocab_size=17, chunk=4)
    out.sum().backward()
    assert out.shape == (0,) and w.grad is not None and not w.grad.any()


class LargestTensor(TorchDispatchMode):
    """Elements of the largest storage that any operator returned."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // tensor.element_size())
        return out


def test_never_more_logits_than_one_chunk() -> None:
    rows, vocab, chunk = 64, 500, 8
    h, w, target = inputs(rows=rows, hidden=4, vocab=vocab, padded=vocab, dtype=torch.float32)
    with LargestTensor() as largest:
        vocab_parallel_logprobs(h, w, target, vocab_size=vocab, chunk=chunk).sum().backward()
    assert largest.elements == chunk * vocab


def test_entropies_with_gradient_take_no_tensor_larger_than_a_chunk() -> None:
    rows, vocab, chunk = 64, 500, 8
    h, w, target = inputs(rows=rows, hidden=4, vocab=vocab, padded=vocab, dtype=torch.float32)
    with LargestTensor() as largest:
        logprobs, entropy = vocab_parallel_logprobs_and_entropies(h, w, target, vocab_size=vocab, chunk=chunk)
        assert entropy is not None
        (logprobs + entropy).sum().backward()
    assert largest.elements == chunk * vocab


def test_a_row_that_is_done_keeps_nothing_of_its_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the last pipeline stage a row's input, as large as its hidden states, and the gradient of it."""
    monkeypatch.setattr(microbatches.parallel_state, "get_tensor_model_parallel_rank", lambda: 0)
    h, w, target = inputs()
    values, entropy = vocab_parallel_logprobs_and_entropies(h, w, target, vocab_size=17, chunk=4)
    batch = SimpleNamespace(streams={}, flat_index=torch.arange(11), tree=SimpleNamespace(entropy=entropy))
    collected = microbatches.Collected()
    expected = entropy.detach().clone()
    loss, *_ = microbatches._loss(collected, lambda logprobs, streams: (logprobs.sum(), {}), batch, values)  # type: ignore[arg-type]
    loss.backward()
    torch.testing.assert_close(collected.entropies[0][1], expected, rtol=0, atol=0)
    row = weakref.ref(h)
    del h, w, values, entropy, loss
    assert row() is None
