"""`truncation: auto` of the Responses API: a conversation that is too long loses its oldest items until it fits.

Instructions stay, and so does the last item: where that alone is too long, the request is refused like any other. How many items have to go
is searched by halving, so a long conversation is rendered and tokenised a few times, and only where it does not fit as it is.
"""

from dataclasses import replace

from engine.types import GenerationRequest
from server.conversation import Conversation
from server.errors import ContextLengthExceeded
from server.intake import Admitted
from server.plan import RenderedPrompt
from server.preprocess import build_requests
from server.responses_input import ResponsePlan, shortened
from server.services import Services

SHARE_FOR_ANSWER = 8  # without max_output_tokens, a shortened conversation leaves one part in so many of the context for the answer


async def fitting_requests(admitted: Admitted, plan: ResponsePlan) -> tuple[GenerationRequest, ...]:
    """What the engine is asked, of as much of the conversation as fits. Raises like `Admitted.requests`."""
    try:
        return await admitted.requests()
    except ContextLengthExceeded:
        if plan.request.truncation != "auto":
            raise
    prompt = await _longest_that_fits(admitted, plan)
    return await replace(admitted, plan=replace(plan, prompts=(prompt,))).requests()


async def _longest_that_fits(admitted: Admitted, plan: ResponsePlan) -> RenderedPrompt:
    """The prompt with the fewest items left out that fits; with only the last one in it, where none does."""
    too_few, enough = 0, len(plan.items) - 1
    best = await _rendered(shortened(plan, num_left_out=enough), admitted.services)
    while enough - too_few > 1:
        middle = (too_few + enough) // 2
        prompt = await _rendered(shortened(plan, num_left_out=middle), admitted.services)
        if await _fits(admitted, plan, prompt):
            best, enough = prompt, middle
        else:
            too_few = middle
    return best


async def _fits(admitted: Admitted, plan: ResponsePlan, prompt: RenderedPrompt) -> bool:
    info = admitted.permit.info
    max_tokens = info.max_model_len // SHARE_FOR_ANSWER if plan.max_tokens is None else plan.max_tokens
    tried = replace(plan, prompts=(prompt,), max_tokens=max_tokens, logprobs=None, grammar=None)
    try:
        await build_requests(tried, services=admitted.services, info=info, request_id=admitted.request_id)
    except ContextLengthExceeded:
        return False
    return True


async def _rendered(conversation: Conversation, services: Services) -> RenderedPrompt:
    assert services.chat_template is not None, "without one there is no plan of a conversation"
    return await services.chat_template.render_off_loop(conversation, turns_param="input")
