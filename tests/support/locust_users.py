"""Users of the load client: `locust -f` reads this file in a process of its own."""

from __future__ import annotations

from locust import HttpUser, task
from locust.contrib.oai import OpenAIUser

CHAT = {"model": "scripted", "messages": [{"role": "user", "content": "Hi"}]}


class WholeAnswers(OpenAIUser):
    """Uses the openai client, which takes its address from the environment."""

    @task
    def chat(self) -> None:
        """Ask and wait."""
        self.client.chat.completions.create(**CHAT)


class Streams(HttpUser):
    """Reads events."""

    @task
    def chat(self) -> None:
        """Ask and read to the end."""
        path, body = "/v1/chat/completions", {**CHAT, "stream": True}
        with self.client.post(path, json=body, stream=True, catch_response=True) as response:
            lines = [line for line in response.iter_lines() if line.startswith(b"data: ")]
            if not lines or lines[-1] != b"data: [DONE]":
                response.failure(f"the stream did not end as it should: {lines[-1:]}")
