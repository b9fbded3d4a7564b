"""The objects of `POST /v1/completions`: choices, legacy log-probabilities, usage, the best of many."""

import math
from collections.abc import Iterable, Sequence

import msgspec

from engine.output import GenerationChunk, TextLogprob
from engine.types import GenerationRequest, TokenLogprob
from server.answers.answer import FINISH_REASONS, AnswerOfChoices, finite, says_something
from server.generation import Update
from server.plan import GenerationPlan
from server.schemas.common import Usage
from server.schemas.completions import Completion, CompletionChoice, Logprobs, PromptLogprob
from server.services import Services
from server.streaming import event


class CompletionAnswer(AnswerOfChoices):
    """One object, streamed or not."""

    id_prefix = "cmpl-"

    def __init__(self, plan: GenerationPlan, requests: Sequence[GenerationRequest], *, services: Services, request_id: str) -> None:
        super().__init__(plan, requests, services=services, request_id=request_id)
        self._told_prompt_ids: set[int] = set()  # sequences

    def whole(self, updates: list[list[Update]]) -> Completion:
        """The answer to everything that arrived, by sequence."""
        choices: list[CompletionChoice] = []
        for prompt in range(len(self.plan.prompts)):
            first = prompt * self.plan.num_candidates
            candidates = updates[first : first + self.plan.num_candidates]
            scores = self._prompt_scores(candidates[0])
            choices += [
                self._choice(
                    prompt * self.plan.num_choices + rank, [update.chunk for update in best], sequence=first, prompt_logprobs=scores
                )
                for rank, best in enumerate(self._best(candidates))
            ]
        return self._completion(choices, self.usage())

    def events(self, updates: Iterable[Update]) -> list[bytes]:
        """At most one piece per choice; pieces that would say nothing are left out. Asked for, the prompt's ids come with the first."""
        choices = [
            self._choice(index, new, sequence=index)
            for index, new in self.chunks_of(updates).items()
            if any(map(says_something, new)) or (self.plan.returns_token_ids and any(chunk.token_ids for chunk in new))
        ]
        return [self._event([choice]) for choice in choices]

    def closing(self) -> list[bytes]:
        """Where usage was asked for, every chunk has the field, null in all but this last."""
        return [self._event([], usage=self.usage()), *super().closing()] if self.plan.include_usage else super().closing()

    def _event(self, choices: list[CompletionChoice], *, usage: Usage | None = None) -> bytes:
        return event(msgspec.json.encode(self._completion(choices, usage if self.plan.include_usage else msgspec.UNSET)))

    def _best(self, candidates: list[list[Update]]) -> list[list[Update]]:
        """The candidates to answer with: all, or with `best_of` those of highest mean log-probability, best first."""
        if self.plan.num_candidates == self.plan.num_choices:
            return candidates
        return sorted(candidates, key=_mean_logprob, reverse=True)[: self.plan.num_choices]

    def _choice(
        self,
        index: int,
        chunks: list[GenerationChunk],
        *,
        sequence: int,
        prompt_logprobs: list[dict[str, PromptLogprob] | None] | msgspec.UnsetType = msgspec.UNSET,
    ) -> CompletionChoice:
        last = chunks[-1]
        num_top = self.plan.logprobs
        choice = CompletionChoice(
            index=index,
            text="".join([chunk.text for chunk in chunks]),
            logprobs=None if num_top is None else _legacy_logprobs([entry for chunk in chunks for entry in chunk.logprobs], num_top),
            finish_reason=None if last.finish_reason is None else FINISH_REASONS[last.finish_reason],
            stop_reason=last.stop_reason,
            prompt_logprobs=prompt_logprobs,
        )
        if not self.plan.returns_token_ids:
            return choice
        return msgspec.structs.replace(
            choice,
            prompt_token_ids=self._prompt_ids_due(sequence),
            token_ids=[token for chunk in chunks for token in chunk.token_ids],
        )

    def _completion(self, choices: list[CompletionChoice], usage: Usage | msgspec.UnsetType | None) -> Completion:
        return Completion(
            id=self.id,
            created=self.created,
            model=self.model_name,
            system_fingerprint=self.fingerprint,
            choices=choices,
            usage=usage,
        )

    def _prompt_ids_due(self, sequence: int) -> list[int] | msgspec.UnsetType:
        """The prompt's ids: in each choice of a whole answer, in a stream with the first piece alone."""
        if self.plan.stream and sequence in self._told_prompt_ids:
            return msgspec.UNSET
        self._told_prompt_ids.add(sequence)
        return list(self.requests[sequence].prompt_token_ids)

    def _prompt_scores(self, updates: list[Update]) -> list[dict[str, PromptLogprob] | None] | msgspec.UnsetType:
        """vLLM's form: per prompt token its candidates by id, null for the first."""
        num_top = self.plan.prompt_logprobs
        if num_top is None:
            return msgspec.UNSET
        entries = [entry for update in updates for entry in update.delta.prompt_logprobs]
        return [None, *(self._candidates(entry, num_top) for entry in entries)]

    def _candidates(self, entry: TokenLogprob, num_top: int) -> dict[str, PromptLogprob]:
        ranked: list[tuple[int, float, int | None]] = [
            (token, logprob, rank) for rank, (token, logprob) in enumerate(entry.top[:num_top], start=1)
        ]
        if all(token != entry.token_id for token, _, _ in ranked):
            rank = next((rank for rank, (token, _) in enumerate(entry.top, start=1) if token == entry.token_id), None)
            ranked.append((entry.token_id, entry.logprob, rank))
        return {
            str(token): PromptLogprob(
                logprob=finite(logprob),
                rank=rank,
                decoded_token=self.tokenizer.token_name(token) if self.tokenizer else f"token_id:{token}",
            )
            for token, logprob, rank in ranked
        }


def _legacy_logprobs(entries: Iterable[TextLogprob], num_top: int) -> Logprobs:
    """Four parallel lists; each `top_logprobs` holds the reported token too, even where it is not among the top."""
    answer = Logprobs(tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[])
    for entry in entries:
        answer.tokens.append(entry.token)
        answer.text_offset.append(entry.text_offset)
        if entry.logprob is None:
            answer.token_logprobs.append(None)
            answer.top_logprobs.append(None)
            continue
        top = {name: finite(logprob) for name, logprob in entry.top[:num_top]}
        answer.token_logprobs.append(finite(entry.logprob))
        top.setdefault(entry.token, finite(entry.logprob))
        answer.top_logprobs.append(top)
    return answer


def _mean_logprob(updates: list[Update]) -> float:
    """Mean over the tokens that count as generated; a candidate without any is the worst."""
    logprobs = [entry.logprob for update in updates for entry in update.delta.logprobs[: len(update.chunk.token_ids)]]
    return math.fsum(logprobs) / len(logprobs) if logprobs else -math.inf
