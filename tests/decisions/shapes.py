# ruff: noqa: E501 - lines stand as they were sent
"""Streams of real providers, shortened by hand: each has its own idea of what an event is.

Sources: their API references and chunks that their users quote, read 2026-11.
"""

from __future__ import annotations

from typing import NamedTuple


class Shape(NamedTuple):
    """Lines as recorded (without `data: `), and what they come to."""

    lines: list[str]
    content_events: int
    finish_reason: str | None
    total_tokens: int | None
    upstream_id: str


OPENAI = Shape(
    [
        '{"id":"chatcmpl-Bq1","object":"chat.completion.chunk","created":1750000000,"model":"gpt-4o-2024-08-06","service_tier":"default","system_fingerprint":"fp_a","choices":[{"index":0,"delta":{"role":"assistant","content":"","refusal":null},"logprobs":null,"finish_reason":null}],"usage":null,"obfuscation":"x9"}',
        '{"id":"chatcmpl-Bq1","object":"chat.completion.chunk","created":1750000000,"model":"gpt-4o-2024-08-06","service_tier":"default","system_fingerprint":"fp_a","choices":[{"index":0,"delta":{"content":"Hi"},"logprobs":null,"finish_reason":null}],"usage":null,"obfuscation":"aB"}',
        '{"id":"chatcmpl-Bq1","object":"chat.completion.chunk","created":1750000000,"model":"gpt-4o-2024-08-06","service_tier":"default","system_fingerprint":"fp_a","choices":[{"index":0,"delta":{"content":"!"},"logprobs":null,"finish_reason":null}],"usage":null,"obfuscation":"aBc"}',
        '{"id":"chatcmpl-Bq1","object":"chat.completion.chunk","created":1750000000,"model":"gpt-4o-2024-08-06","service_tier":"default","system_fingerprint":"fp_a","choices":[{"index":0,"delta":{},"logprobs":null,"finish_reason":"stop"}],"usage":null,"obfuscation":"a"}',
        '{"id":"chatcmpl-Bq1","object":"chat.completion.chunk","created":1750000000,"model":"gpt-4o-2024-08-06","service_tier":"default","system_fingerprint":"fp_a","choices":[],"usage":{"prompt_tokens":9,"completion_tokens":2,"total_tokens":11,"prompt_tokens_details":{"cached_tokens":0,"audio_tokens":0},"completion_tokens_details":{"reasoning_tokens":0}},"obfuscation":""}',
        "[DONE]",
    ],
    2, "stop", 11, "chatcmpl-Bq1",
)  # fmt: skip
SHAPES: dict[str, Shape] = {
    "openai": OPENAI,
    "openai-tools": Shape(
        [
            '{"id":"chatcmpl-Bt","object":"chat.completion.chunk","created":1,"model":"gpt-4o","system_fingerprint":null,"choices":[{"index":0,"delta":{"role":"assistant","content":null,"tool_calls":[{"index":0,"id":"call_7","type":"function","function":{"name":"get_weather","arguments":""}}],"refusal":null},"logprobs":null,"finish_reason":null}]}',
            '{"id":"chatcmpl-Bt","object":"chat.completion.chunk","created":1,"model":"gpt-4o","system_fingerprint":null,"choices":[{"index":0,"delta":{"tool_calls":[{"index":0,"function":{"arguments":"{\\"id\\":\\"chatcmpl-Bt\\",\\"model\\":\\"gpt-4o\\""}}]},"logprobs":null,"finish_reason":null}]}',
            '{"id":"chatcmpl-Bt","object":"chat.completion.chunk","created":1,"model":"gpt-4o","system_fingerprint":null,"choices":[{"index":0,"delta":{"tool_calls":[{"index":0,"function":{"arguments":"}"}}]},"logprobs":null,"finish_reason":null}]}',
            '{"id":"chatcmpl-Bt","object":"chat.completion.chunk","created":1,"model":"gpt-4o","system_fingerprint":null,"choices":[{"index":0,"delta":{},"logprobs":null,"finish_reason":"tool_calls"}]}',
            "[DONE]",
        ],
        3, "tool_calls", None, "chatcmpl-Bt",
    ),
    "vllm": Shape(
        [
            '{"id":"chatcmpl-9f","object":"chat.completion.chunk","created":1750000000,"model":"meta-llama/Llama-3.1-8B","choices":[{"index":0,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}],"usage":{"prompt_tokens":5,"total_tokens":5,"completion_tokens":0}}',
            '{"id":"chatcmpl-9f","object":"chat.completion.chunk","created":1750000000,"model":"meta-llama/Llama-3.1-8B","choices":[{"index":0,"delta":{"content":"One"},"logprobs":null,"finish_reason":null,"stop_reason":null}],"usage":{"prompt_tokens":5,"total_tokens":6,"completion_tokens":1}}',
            '{"id":"chatcmpl-9f","object":"chat.completion.chunk","created":1750000000,"model":"meta-llama/Llama-3.1-8B","choices":[{"index":0,"delta":{"content":""},"logprobs":null,"finish_reason":"length","stop_reason":null}],"usage":{"prompt_tokens":5,"total_tokens":7,"completion_tokens":2}}',
            '{"id":"chatcmpl-9f","object":"chat.completion.chunk","created":1750000000,"model":"meta-llama/Llama-3.1-8B","choices":[],"usage":{"prompt_tokens":5,"total_tokens":8,"completion_tokens":3}}',
            "[DONE]",
        ],
        1, "length", 8, "chatcmpl-9f",
    ),
    "llama.cpp": Shape(
        [
            '{"choices":[{"finish_reason":null,"index":0,"delta":{"role":"assistant","content":null}}],"created":1750000000,"id":"chatcmpl-kQ","model":"gpt-3.5-turbo","system_fingerprint":"b5600-0","object":"chat.completion.chunk"}',
            '{"choices":[{"finish_reason":null,"index":0,"delta":{"content":"A"}}],"created":1750000000,"id":"chatcmpl-kQ","model":"gpt-3.5-turbo","system_fingerprint":"b5600-0","object":"chat.completion.chunk"}',
            '{"choices":[{"finish_reason":null,"index":0,"delta":{"content":"B"}}],"created":1750000000,"id":"chatcmpl-kQ","model":"gpt-3.5-turbo","system_fingerprint":"b5600-0","object":"chat.completion.chunk"}',
            '{"choices":[{"finish_reason":null,"index":0,"delta":{"content":"C"}}],"created":1750000001,"id":"chatcmpl-kQ","model":"gpt-3.5-turbo","system_fingerprint":"b5600-0","object":"chat.completion.chunk"}',
            '{"choices":[{"finish_reason":"stop","index":0,"delta":{}}],"created":1750000001,"id":"chatcmpl-kQ","model":"gpt-3.5-turbo","system_fingerprint":"b5600-0","object":"chat.completion.chunk"}',
            '{"choices":[],"created":1750000001,"id":"chatcmpl-kQ","model":"gpt-3.5-turbo","system_fingerprint":"b5600-0","object":"chat.completion.chunk","usage":{"completion_tokens":4,"prompt_tokens":6,"total_tokens":10},"timings":{"prompt_n":6,"predicted_ms":9.5}}',
            "[DONE]",
        ],
        3, "stop", 10, "chatcmpl-kQ",
    ),
    "ollama": Shape(
        [
            '{"id":"chatcmpl-7","object":"chat.completion.chunk","created":1750000000,"model":"llama3.2:1b","system_fingerprint":"fp_ollama","choices":[{"index":0,"delta":{"role":"assistant","content":"A"},"finish_reason":null}]}',
            '{"id":"chatcmpl-7","object":"chat.completion.chunk","created":1750000000,"model":"llama3.2:1b","system_fingerprint":"fp_ollama","choices":[{"index":0,"delta":{"role":"assistant","content":"B"},"finish_reason":null}]}',
            '{"id":"chatcmpl-7","object":"chat.completion.chunk","created":1750000001,"model":"llama3.2:1b","system_fingerprint":"fp_ollama","choices":[{"index":0,"delta":{"role":"assistant","content":"C"},"finish_reason":null}]}',
            '{"id":"chatcmpl-7","object":"chat.completion.chunk","created":1750000002,"model":"llama3.2:1b","system_fingerprint":"fp_ollama","choices":[{"index":0,"delta":{"role":"assistant","content":""},"finish_reason":"stop"}]}',
            '{"id":"chatcmpl-7","object":"chat.completion.chunk","created":1750000002,"model":"llama3.2:1b","system_fingerprint":"fp_ollama","choices":[],"usage":{"prompt_tokens":26,"completion_tokens":3,"total_tokens":29}}',
            "[DONE]",
        ],
        3, "stop", 29, "chatcmpl-7",
    ),
    "groq": Shape(
        [
            '{"id":"chatcmpl-e1","object":"chat.completion.chunk","created":1,"model":"llama-3.3-70b-versatile","system_fingerprint":"fp_g","choices":[{"index":0,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}],"x_groq":{"id":"req_01"}}',
            '{"id":"chatcmpl-e1","object":"chat.completion.chunk","created":1,"model":"llama-3.3-70b-versatile","system_fingerprint":"fp_g","choices":[{"index":0,"delta":{"content":"Hey"},"logprobs":null,"finish_reason":null}]}',
            '{"id":"chatcmpl-e1","object":"chat.completion.chunk","created":1,"model":"llama-3.3-70b-versatile","system_fingerprint":"fp_g","choices":[{"index":0,"delta":{},"logprobs":null,"finish_reason":"stop"}],"x_groq":{"id":"req_01","usage":{"total_tokens":44}}}',
            '{"id":"chatcmpl-e1","object":"chat.completion.chunk","created":1,"model":"llama-3.3-70b-versatile","system_fingerprint":"fp_g","choices":[],"usage":{"queue_time":0.05,"prompt_tokens":40,"completion_tokens":4,"total_tokens":44,"total_time":0.01}}',
            "[DONE]",
        ],
        1, "stop", 44, "chatcmpl-e1",
    ),
    "azure": Shape(
        [
            '{"choices":[],"created":0,"id":"","model":"","object":"","prompt_filter_results":[{"prompt_index":0,"content_filter_results":{"hate":{"filtered":false,"severity":"safe"}}}]}',
            '{"choices":[{"content_filter_results":{},"delta":{"content":"","refusal":null,"role":"assistant"},"finish_reason":null,"index":0,"logprobs":null}],"created":1,"id":"chatcmpl-Az","model":"gpt-4o-2024-11-20","object":"chat.completion.chunk","system_fingerprint":"fp_z","usage":null}',
            '{"choices":[{"content_filter_results":{"hate":{"filtered":false}},"delta":{"content":"Yes"},"finish_reason":null,"index":0,"logprobs":null}],"created":1,"id":"chatcmpl-Az","model":"gpt-4o-2024-11-20","object":"chat.completion.chunk","system_fingerprint":"fp_z","usage":null}',
            '{"choices":[{"content_filter_results":{},"delta":{},"finish_reason":"content_filter","index":0,"logprobs":null}],"created":1,"id":"chatcmpl-Az","model":"gpt-4o-2024-11-20","object":"chat.completion.chunk","system_fingerprint":"fp_z","usage":null}',
            '{"choices":[],"created":1,"id":"chatcmpl-Az","model":"gpt-4o-2024-11-20","object":"chat.completion.chunk","system_fingerprint":"fp_z","usage":{"completion_tokens":1,"prompt_tokens":8,"total_tokens":9}}',
            "[DONE]",
        ],
        1, "content_filter", 9, "chatcmpl-Az",
    ),
    "deepseek-reasoner": Shape(
        [
            '{"id":"5f","object":"chat.completion.chunk","created":1,"model":"deepseek-reasoner","system_fingerprint":"fp_d","choices":[{"index":0,"delta":{"role":"assistant","content":null,"reasoning_content":""},"logprobs":null,"finish_reason":null}]}',
            '{"id":"5f","object":"chat.completion.chunk","created":1,"model":"deepseek-reasoner","system_fingerprint":"fp_d","choices":[{"index":0,"delta":{"content":null,"reasoning_content":"Hm"},"logprobs":null,"finish_reason":null}]}',
            ": keep-alive",
            '{"id":"5f","object":"chat.completion.chunk","created":1,"model":"deepseek-reasoner","system_fingerprint":"fp_d","choices":[{"index":0,"delta":{"content":"42","reasoning_content":null},"logprobs":null,"finish_reason":null}]}',
            '{"id":"5f","object":"chat.completion.chunk","created":1,"model":"deepseek-reasoner","system_fingerprint":"fp_d","choices":[{"index":0,"delta":{"content":"","reasoning_content":null},"logprobs":null,"finish_reason":"stop"}],"usage":{"prompt_tokens":3,"completion_tokens":4,"total_tokens":7,"prompt_cache_hit_tokens":0}}',
            "[DONE]",
        ],
        2, "stop", 7, "5f",
    ),
    "azure, filter beside the stream": Shape(
        [
            '{"choices":[],"created":0,"id":"","model":"","object":"","prompt_filter_results":[{"prompt_index":0,"content_filter_results":{"hate":{"filtered":false,"severity":"safe"}}}]}',
            '{"choices":[{"content_filter_results":{},"delta":{"content":"","refusal":null,"role":"assistant"},"finish_reason":null,"index":0,"logprobs":null}],"created":1,"id":"chatcmpl-Az","model":"gpt-4o-2024-11-20","obfuscation":"q","object":"chat.completion.chunk","service_tier":"default","system_fingerprint":null,"usage":null}',
            '{"choices":[{"content_filter_results":{},"delta":{"content":"Yes"},"finish_reason":null,"index":0,"logprobs":null}],"created":1,"id":"chatcmpl-Az","model":"gpt-4o-2024-11-20","obfuscation":"qR","object":"chat.completion.chunk","service_tier":"default","system_fingerprint":null,"usage":null}',
            '{"choices":[{"content_filter_offsets":{"check_offset":44,"start_offset":44,"end_offset":198},"content_filter_results":{"hate":{"filtered":false,"severity":"safe"}},"finish_reason":null,"index":0}],"created":0,"id":"","model":"","object":""}',
            '{"choices":[{"content_filter_results":{},"delta":{"content":"."},"finish_reason":null,"index":0,"logprobs":null}],"created":1,"id":"chatcmpl-Az","model":"gpt-4o-2024-11-20","obfuscation":"qRs","object":"chat.completion.chunk","service_tier":"default","system_fingerprint":null,"usage":null}',
            '{"choices":[{"content_filter_results":{},"delta":{},"finish_reason":"stop","index":0,"logprobs":null}],"created":1,"id":"chatcmpl-Az","model":"gpt-4o-2024-11-20","obfuscation":"","object":"chat.completion.chunk","service_tier":"default","system_fingerprint":null,"usage":null}',
            '{"choices":[{"content_filter_offsets":{"check_offset":44,"start_offset":44,"end_offset":260},"content_filter_results":{"hate":{"filtered":false,"severity":"safe"}},"finish_reason":null,"index":0}],"created":0,"id":"","model":"","object":""}',
            '{"choices":[],"created":1,"id":"chatcmpl-Az","model":"gpt-4o-2024-11-20","obfuscation":"x","object":"chat.completion.chunk","service_tier":"default","system_fingerprint":null,"usage":{"completion_tokens":2,"completion_tokens_details":{"reasoning_tokens":0},"latency_checkpoint":{"engine_ttft_ms":31},"prompt_tokens":8,"total_tokens":10}}',
            "[DONE]",
        ],
        2, "stop", 10, "chatcmpl-Az",
    ),
    "azure, blocked from beside": Shape(
        [
            '{"choices":[{"content_filter_results":{},"delta":{"content":"No"},"finish_reason":null,"index":0,"logprobs":null}],"created":1,"id":"chatcmpl-Az","model":"gpt-4o-2024-11-20","object":"chat.completion.chunk","system_fingerprint":null,"usage":null}',
            '{"choices":[{"content_filter_offsets":{"check_offset":44,"start_offset":44,"end_offset":46},"content_filter_results":{"custom_blocklists":[{"filtered":true,"id":"b"}]},"finish_reason":"content_filter","index":0}],"created":0,"id":"","model":"","object":""}',
            "[DONE]",
        ],
        1, "content_filter", None, "chatcmpl-Az",
    ),
    "anthropic, compatible": Shape(
        [
            '{"id":"msg_01","choices":[{"index":0,"delta":{"role":"assistant","content":"I see"}}],"created":1,"model":"claude-sonnet-5","object":"chat.completion.chunk"}',
            '{"id":"msg_01","choices":[{"index":0,"delta":{"content":"."}}],"created":1,"model":"claude-sonnet-5","object":"chat.completion.chunk"}',
            '{"id":"msg_01","choices":[{"index":0,"delta":{"tool_calls":[{"index":0,"id":"toolu_1","type":"function","function":{"name":"look","arguments":""}}]}}],"created":1,"model":"claude-sonnet-5","object":"chat.completion.chunk"}',
            '{"id":"msg_01","choices":[{"index":0,"delta":{"tool_calls":[{"index":0,"type":"function","function":{"arguments":"{}"}}]}}],"created":1,"model":"claude-sonnet-5","object":"chat.completion.chunk"}',
            '{"id":"msg_01","choices":[{"index":0,"delta":{},"finish_reason":"tool_calls"}],"created":1,"model":"claude-sonnet-5","object":"chat.completion.chunk","usage":{"completion_tokens":79,"prompt_tokens":12376,"total_tokens":12455}}',
            "[DONE]",
        ],
        4, "tool_calls", 12455, "msg_01",
    ),
    "gemini, compatible": Shape(
        [
            '{"choices":[{"delta":{"content":"<thought>**Greeting**\\n","extra_content":{"google":{"thought":true}},"role":"assistant"},"index":0}],"created":1,"id":"1URyaLju","model":"gemini-3.5-flash","object":"chat.completion.chunk"}',
            '{"choices":[{"delta":{"content":"</thought>No","role":"assistant"},"index":0}],"created":1,"id":"1URyaLju","model":"gemini-3.5-flash","object":"chat.completion.chunk"}',
            '{"choices":[{"delta":{"content":", 391 = 17 ä 23.","extra_content":{"google":{"thought_signature":"Eo4GCosG"}},"role":"assistant"},"finish_reason":"stop","index":0}],"created":1,"id":"1URyaLju","model":"gemini-3.5-flash","object":"chat.completion.chunk","usage":{"completion_tokens":24,"prompt_tokens":11,"total_tokens":561}}',
            "[DONE]",
        ],
        3, "stop", 561, "1URyaLju",
    ),
    "gemini, a call it could not form": Shape(
        [
            '{"choices":[{"delta":{"role":"assistant","tool_calls":[{"extra_content":{"google":{"thought_signature":"Eo4="}},"function":{"arguments":"{}","name":"task"},"id":"FL1t","type":"function"}]},"index":0}],"created":1,"id":"2","model":"gemini-3.8-flash","object":"chat.completion.chunk"}',
            '{"choices":[{"delta":{"role":"assistant"},"finish_reason":"function_call_filter: MALFORMED_FUNCTION_CALL","index":0}],"created":1,"id":"2","model":"gemini-3.8-flash","object":"chat.completion.chunk","usage":{"completion_tokens":0,"prompt_tokens":50,"total_tokens":130}}',
            "[DONE]",
        ],
        1, "function_call_filter: MALFORMED_FUNCTION_CALL", 130, "2",
    ),
    "gemini, calls without a number": Shape(
        [
            '{"choices":[{"delta":{"role":"assistant","tool_calls":[{"extra_content":{"google":{"thought_signature":"Eo4="}},"function":{"arguments":"{\\"city\\":","name":"look"},"id":"call_1","type":"function"}]},"index":0}],"created":1,"id":"3","model":"gemini-3.8-flash","object":"chat.completion.chunk"}',
            '{"choices":[{"delta":{"role":"assistant","tool_calls":[{"function":{"arguments":"\\"Oslo\\"}"},"type":"function"}]},"index":0}],"created":1,"id":"3","model":"gemini-3.8-flash","object":"chat.completion.chunk"}',
            '{"choices":[{"delta":{"role":"assistant","tool_calls":[{"function":{"arguments":"{}","name":"look"},"id":"","type":"function"},{"function":{"arguments":"{}","name":"listen"},"id":"call_3","type":"function"}]},"index":0}],"created":1,"id":"3","model":"gemini-3.8-flash","object":"chat.completion.chunk"}',
            '{"choices":[{"delta":{"role":"assistant"},"finish_reason":"stop","index":0}],"created":1,"id":"3","model":"gemini-3.8-flash","object":"chat.completion.chunk","usage":{"completion_tokens":12,"prompt_tokens":50,"total_tokens":62}}',
            "[DONE]",
        ],
        3, "stop", 62, "3",
    ),
    "mistral, which thinks in parts": Shape(
        [
            '{"id":"7e37","object":"chat.completion.chunk","created":1,"model":"mistral-medium-3-5","choices":[{"index":0,"delta":{"role":"assistant","content":""},"finish_reason":null}],"p":"abcdefg"}',
            '{"id":"7e37","object":"chat.completion.chunk","created":1,"model":"mistral-medium-3-5","choices":[{"index":0,"delta":{"content":[{"type":"thinking","thinking":[{"type":"text","text":"Hm"}]}]},"finish_reason":null}],"p":"abc"}',
            '{"id":"7e37","object":"chat.completion.chunk","created":1,"model":"mistral-medium-3-5","choices":[{"index":0,"delta":{"content":"3."},"finish_reason":null}],"p":"abcdefghij"}',
            '{"id":"7e37","object":"chat.completion.chunk","created":1,"model":"mistral-medium-3-5","choices":[{"index":0,"delta":{"content":"4"},"finish_reason":null}],"p":"a"}',
            '{"id":"7e37","object":"chat.completion.chunk","created":1,"model":"mistral-medium-3-5","choices":[{"index":0,"delta":{"content":""},"finish_reason":"model_length"}],"usage":{"prompt_tokens":100,"total_tokens":300,"completion_tokens":200},"p":"abcd"}',
            "[DONE]",
        ],
        3, "model_length", 300, "7e37",
    ),
    "cerebras": Shape(
        [
            ": cerebras heartbeat",
            '{"id":"chatcmpl-c5","choices":[{"delta":{"role":"assistant"},"index":0}],"created":1,"model":"gpt-oss-120b","system_fingerprint":"fp_c","object":"chat.completion.chunk"}',
            '{"id":"chatcmpl-c5","choices":[{"delta":{"reasoning":"Hm"},"index":0}],"created":1,"model":"gpt-oss-120b","system_fingerprint":"fp_c","object":"chat.completion.chunk"}',
            '{"id":"chatcmpl-c5","choices":[{"delta":{"content":"Hello"},"index":0}],"created":1,"model":"gpt-oss-120b","system_fingerprint":"fp_c","object":"chat.completion.chunk"}',
            '{"id":"chatcmpl-c5","choices":[{"delta":{},"finish_reason":"stop","index":0}],"created":1,"model":"gpt-oss-120b","system_fingerprint":"fp_c","object":"chat.completion.chunk"}',
            '{"id":"chatcmpl-c5","choices":[],"created":1,"model":"gpt-oss-120b","system_fingerprint":"fp_c","object":"chat.completion.chunk","usage":{"prompt_tokens":69,"completion_tokens":45,"total_tokens":114,"prompt_tokens_details":{"cached_tokens":32}},"time_info":{"queue_time":0.001,"total_time":0.09,"created":1782514735.28}}',
            "[DONE]",
        ],
        2, "stop", 114, "chatcmpl-c5",
    ),
    "together": Shape(
        [
            '{"id":"8b43-SJC","object":"chat.completion.chunk","created":1,"choices":[{"index":0,"text":"AB","logprobs":null,"finish_reason":null,"seed":null,"delta":{"token_id":30,"role":"assistant","content":"AB","tool_calls":null}}],"model":"openai/gpt-oss-20b","usage":null}',
            '{"id":"8b43-SJC","object":"chat.completion.chunk","created":1,"choices":[{"index":0,"text":"C","logprobs":null,"finish_reason":null,"seed":null,"delta":{"token_id":31,"role":"assistant","content":"C","tool_calls":null}}],"model":"openai/gpt-oss-20b","usage":null}',
            '{"id":"8b43-SJC","object":"chat.completion.chunk","created":1,"choices":[{"index":0,"text":"","logprobs":null,"finish_reason":"eos","seed":9,"delta":{"token_id":128009,"role":"assistant","content":"","tool_calls":null}}],"model":"openai/gpt-oss-20b","usage":{"prompt_tokens":5,"completion_tokens":3,"total_tokens":8}}',
            "[DONE]",
        ],
        2, "eos", 8, "8b43-SJC",
    ),
    "vllm, which reasons": Shape(
        [
            '{"id":"chatcmpl-9f","object":"chat.completion.chunk","created":1,"model":"Qwen/Qwen3-8B","choices":[{"index":0,"delta":{"role":"assistant","content":"","reasoning_content":null},"logprobs":null,"finish_reason":null}],"prompt_token_ids":null}',
            '{"id":"chatcmpl-9f","object":"chat.completion.chunk","created":1,"model":"Qwen/Qwen3-8B","choices":[{"index":0,"delta":{"reasoning":"Hm","reasoning_content":"Hm"},"logprobs":null,"finish_reason":null,"token_ids":null}]}',
            '{"id":"chatcmpl-9f","object":"chat.completion.chunk","created":1,"model":"Qwen/Qwen3-8B","choices":[{"index":0,"delta":{"content":"One","reasoning_content":null},"logprobs":null,"finish_reason":null,"token_ids":null}]}',
            '{"id":"chatcmpl-9f","object":"chat.completion.chunk","created":1,"model":"Qwen/Qwen3-8B","choices":[{"index":0,"delta":{"content":""},"logprobs":null,"finish_reason":"abort","stop_reason":null,"token_ids":null}]}',
            '{"id":"chatcmpl-9f","object":"chat.completion.chunk","created":1,"model":"Qwen/Qwen3-8B","choices":null,"usage":{"prompt_tokens":5,"total_tokens":8,"completion_tokens":3}}',
            "[DONE]",
        ],
        2, "abort", None, "chatcmpl-9f",
    ),
    "a gateway like ours": Shape(
        [
            '{"id":"gen-1-x","provider":"Elsewhere","model":"other/name","object":"chat.completion.chunk","created":1,"choices":[{"index":0,"delta":{"role":"assistant","content":"A","reasoning":null,"reasoning_details":[]},"finish_reason":null,"native_finish_reason":null,"logprobs":null}]}',
            '{"id":"gen-1-x","provider":"Elsewhere","model":"other/name","object":"chat.completion.chunk","created":1,"choices":[{"index":0,"delta":{"role":"assistant","content":"","reasoning":"R","reasoning_details":[{"type":"reasoning.text","text":"R"}]},"finish_reason":null,"native_finish_reason":null,"logprobs":null}]}',
            '{"id":"gen-1-x","provider":"Elsewhere","model":"other/name","object":"chat.completion.chunk","created":1,"choices":[{"index":0,"delta":{"role":"assistant","content":""},"finish_reason":"stop","native_finish_reason":"end_turn","logprobs":null}]}',
            '{"id":"gen-1-x","provider":"Elsewhere","model":"other/name","object":"chat.completion.chunk","created":1,"choices":[{"index":0,"delta":{"role":"assistant","content":""},"finish_reason":null,"native_finish_reason":null,"logprobs":null}],"usage":{"prompt_tokens":1,"completion_tokens":2,"total_tokens":3,"cost":0.1}}',
            "[DONE]",
        ],
        2, "stop", 3, "gen-1-x",
    ),
    "a new id for each event": Shape(
        [
            '{"id":"a1","object":"chat.completion.chunk","created":1,"model":"m","choices":[{"index":0,"delta":{"content":"A"},"finish_reason":null}]}',
            '{"id":"a2","object":"chat.completion.chunk","created":1,"model":"m","choices":[{"index":0,"delta":{"content":"B"},"finish_reason":null}]}',
            '{"id":"a3","object":"chat.completion.chunk","created":1,"model":"m2","choices":[{"index":0,"delta":{"content":"C"},"finish_reason":null}]}',
            '{"id":"a4","object":"chat.completion.chunk","created":1,"model":"m","choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}',
        ],
        3, "stop", None, "a1",
    ),
    "spaced": Shape(
        [
            '{"id": "cmpl-s", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [{"index": 0, "delta": {"role": "assistant", "content": "A"}, "finish_reason": null}], "usage": null}',
            '{"id": "cmpl-s", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [{"index": 0, "delta": {"content": "B"}, "finish_reason": null}], "usage": null}',
            '{"id":"cmpl-s", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [{"index": 0, "delta": {"content": "C"}, "finish_reason" : null}], "usage" : null}',
            '{"id": "cmpl-s", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [{"index": 0, "delta": {}, "finish_reason" :\t"stop"}], "usage": {"total_tokens": 5, "prompt_tokens": 2}}',
            "[DONE]",
        ],
        3, "stop", 5, "cmpl-s",
    ),
    "names that must be escaped": Shape(
        [
            '{"id":"a\\"b\\\\c","object":"chat.completion.chunk","created":1,"model":"模型 \\"x\\"\\n","choices":[{"index":0,"delta":{"content":"A"},"finish_reason":null}]}',
            '{"id":"a\\"b\\\\c","object":"chat.completion.chunk","created":1,"model":"模型 \\"x\\"\\n","choices":[{"index":0,"delta":{"content":"B"},"finish_reason":null}]}',
            '{"id":"a\\"b\\\\c","object":"chat.completion.chunk","created":1,"model":"\\u6a21\\u578b \\"x\\"\\n","choices":[{"index":0,"delta":{"content":"C"},"finish_reason":"stop"}]}',
        ],
        3, "stop", None, 'a"b\\c',
    ),
    "text that looks like ours": Shape(
        [
            '{"id":"e1","object":"chat.completion.chunk","created":1,"model":"m","choices":[{"index":0,"delta":{"content":"{\\"id\\":\\"e1\\",\\"model\\":\\"m\\"}"},"finish_reason":null}]}',
            '{"id":"e1","object":"chat.completion.chunk","created":1,"model":"m","choices":[{"index":0,"delta":{"content":"\\"finish_reason\\":\\"stop\\",\\"usage\\":{},\\"error\\":{}"},"finish_reason":null}]}',
            '{"id":"e1","object":"chat.completion.chunk","created":1,"model":"m","choices":[{"index":0,"delta":{"content":"finish_reason"},"finish_reason":null}]}',
            '{"id":"e1","object":"chat.completion.chunk","created":1,"model":"m","choices":[{"index":0,"delta":{"content":"usage"},"finish_reason":null}]}',
            '{"id":"e1","object":"chat.completion.chunk","created":1,"model":"m","choices":[{"index":0,"delta":{"content":"error"},"finish_reason":null}]}',
            '{"id":"e1","object":"chat.completion.chunk","created":1,"model":"m","choices":[{"index":0,"delta":{"content":"data: {"},"finish_reason":null}]}',
            '{"id":"e1","object":"chat.completion.chunk","created":1,"model":"m","choices":[{"index":0,"delta":{"content":"}\\n\\ndata: [DONE]\\n\\n"},"finish_reason":null}]}',
            '{"id":"e1","object":"chat.completion.chunk","created":1,"model":"m","choices":[{"index":0,"delta":{"content":",\\"usage\\":null"},"finish_reason":null}]}',
            '{"id":"e1","object":"chat.completion.chunk","created":1,"model":"m","choices":[{"index":0,"delta":{"content":"\\"choices\\":["},"finish_reason":"stop"}]}',
            "[DONE]",
        ],
        9, "stop", None, "e1",
    ),
    "a tool call with the event's id": Shape(
        [
            '{"id":"e1","object":"chat.completion.chunk","created":1,"model":"m","choices":[{"index":0,"delta":{"content":"A"},"finish_reason":null}]}',
            '{"id":"e1","object":"chat.completion.chunk","created":1,"model":"m","choices":[{"index":0,"delta":{"content":"B","tool_calls":[{"index":0,"id":"e1","type":"function","function":{"name":"f","arguments":"","model":"m"}}]},"finish_reason":null}]}',
            '{"id":"e2","object":"chat.completion.chunk","created":1,"model":"m","choices":[{"index":0,"delta":{"content":"C"},"finish_reason":null}]}',
            '{"id":"e1","object":"chat.completion.chunk","created":1,"model":"m","choices":[{"index":0,"delta":{"tool_calls":[{"index":0,"id":"e1","type":"function","function":{"name":"f","arguments":""}}]},"finish_reason":"tool_calls"}]}',
        ],
        4, "tool_calls", None, "e1",
    ),
    "legacy text": Shape(
        [
            '{"id":"cmpl-1","object":"text_completion","created":1,"model":"m","choices":[{"index":0,"text":"","logprobs":null,"finish_reason":null}]}',
            '{"id":"cmpl-1","object":"text_completion","created":1,"model":"m","choices":[{"index":0,"text":"A","logprobs":null,"finish_reason":null}]}',
            '{"id":"cmpl-1","object":"text_completion","created":1,"model":"m","choices":[{"index":0,"text":"B","logprobs":null,"finish_reason":null}]}',
            '{"id":"cmpl-1","object":"text_completion","created":1,"model":"m","choices":[{"index":0,"text":"","logprobs":null,"finish_reason":"eos"}],"usage":{"total_tokens":6,"prompt_tokens":4}}',
            "[DONE]",
        ],
        2, "eos", 6, "cmpl-1",
    ),
    "members missing": Shape(
        [
            '{"choices":[{"delta":{"content":"A"}}]}',
            '{"choices":[{"delta":{"content":"B"}}],"model":null}',
            '{"id":5,"choices":[{"delta":{"role":null,"content":"C","tool_calls":null,"function_call":null},"finish_reason":""}],"error":null}',
            '{"object":"chat.completion.chunk"}',
            "{}",
            '{"choices":null}',
            '{"choices":[{"delta":null,"finish_reason":"STOP"}],"usage":{}}',
            '{"choices":[{}]}',
        ],
        3, "STOP", None, "5",
    ),
    "usage thrice": Shape(
        [
            '{"id":"u","model":"m","choices":[{"index":0,"delta":{"content":"A"},"finish_reason":null}],"usage":{"total_tokens":1,"prompt_tokens":1}}',
            '{"id":"u","model":"m","choices":[{"index":0,"delta":{},"finish_reason":"stop"}],"usage":{"total_tokens":2,"prompt_tokens":1}}',
            '{"id":"u","model":"m","usage":{"total_tokens":3,"prompt_tokens":1},"choices":[]}',
            '{"id":"u","model":"m","usage":null,"choices":[]}',
            "[DONE]",
        ],
        1, "stop", 3, "u",
    ),
}  # fmt: skip
