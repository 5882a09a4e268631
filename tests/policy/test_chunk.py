"""How prompts are cut into chunks."""

from hypothesis import given, settings
from hypothesis import strategies as st

from tetri.policy.chunk import pack
from tetri.policy.views import Progress


@settings(deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.integers(0, 30), st.integers(1, 30)), max_size=8), st.integers(1, 40))
def test_chunks_are_full_in_order_and_cut_only_at_their_end(sizes, chunk_tokens):
    prompts = [Progress(str(number), done, done + more) for number, (done, more) in enumerate(sizes)]
    spans = pack(prompts, chunk_tokens)
    assert sum(span.stop - span.start for span in spans) == min(chunk_tokens, sum(more for _, more in sizes))
    assert [span.key for span in spans] == [prompt.key for prompt in prompts[: len(spans)]]
    for span, prompt in zip(spans, prompts, strict=False):
        assert span.start == prompt.done < span.stop <= prompt.goal
        assert span.stop == prompt.goal or span is spans[-1]
