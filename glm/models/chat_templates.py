"""Jinja chat templates of the ChatGLM generations: one source for training, evaluation, chat and export.

A template gives the whole string of a dialogue with the control tokens spelled out. Answers stand inside
`{% generation %}` blocks, so that training can put labels on them alone; the token that ends an answer (the end token,
or the next role's token where that is what stops generation) belongs to its answer, as in the authors' fine-tuning
scripts. ChatGLM-6B's mask makes everything before `<sop>` visible to everything, so only its last answer can be
learned: earlier ones carry no block. A blank before a text stands for the word mark (sentencepiece's `▁`) with which
the authors' code starts every text that it encodes on its own.

Sources: `chat` and `build_prompt` of the authors' modelling files (ChatGLM-6B: rounds from 0, no wrapper for a first
question; ChatGLM2-6B: rounds from 1, blank lines); `build_chat_input` of ChatGLM3-6B; `build_single_message` and the
published template of GLM-4-9B; for a system message before rounds, the prefix of ChatGLM Efficient Tuning (prefix,
newline, prompt). ChatGLM2/3's `sop` is spelled `<sop>`, see tokenization_chatglm2.py.
"""

_ROUNDS = """
{%- if tools %}{{ raise_exception("this prompt format has no place for tools") }}{% endif %}
{{- "@HEAD@" }}
{%- set dialogue = messages %}
{%- if messages[0].role == "system" %}
{%- set dialogue = messages[1:] %}
{%- if messages[0].content is not string %}
{{- raise_exception("the system message's content must be a string") }}
{%- endif %}
{{- messages[0].content ~ "\\n" if messages[0].content else "" }}
{%- endif %}
{%- if not dialogue %}{{ raise_exception("the dialogue has no user message") }}{% endif %}
{%- set bare = @BARE@ and dialogue | length <= 2 %}
{%- for message in dialogue %}
{%- if message.role != ("user" if loop.index0 % 2 == 0 else "assistant") %}
{{- raise_exception("after at most one system message, user and assistant must take turns, user first; message "
    ~ loop.index ~ " of the dialogue has role '" ~ message.role ~ "'") }}
{%- endif %}
{%- if message.content is not string %}
{{- raise_exception("message " ~ loop.index ~ " of the dialogue: content must be a string") }}
{%- endif %}
{%- if message.role == "user" %}
{%- set cue = not loop.last or add_generation_prompt %}
{%- if bare %}
{{- message.content }}
{%- else %}
{{- "" if loop.first else "@BREAK@" }}
{{- "[Round " ~ (loop.index0 // 2 + @FIRST@) ~ "]@BREAK@问：" ~ message.content ~ ("@BREAK@答：" if cue else "") }}
{%- endif %}
{{- "@TAIL@" if cue and loop.revindex0 <= 1 else "" }}
{%- elif loop.last %}
{%- generation %}{{ @ANSWER@ ~ eos_token }}{% endgeneration %}
{%- else %}@HISTORY@{%- endif %}
{%- endfor %}
"""


def _chatglm1(*, first: int, line_break: str, bare: bool) -> str:
    return _fill(
        _ROUNDS,
        HEAD="",
        TAIL="[gMASK]<sop>",
        ANSWER="message.content",
        HISTORY="{{ message.content }}",
        BARE=str(bare).lower(),
        FIRST=str(first),
        BREAK=line_break,
    )


def _fill(template: str, **values: str) -> str:
    for name, value in values.items():
        template = template.replace(f"@{name}@", value)
    return template.strip()


CHATGLM1 = _chatglm1(first=0, line_break="\\n", bare=True)
CHATGLM1_NUMBERED = _chatglm1(first=1, line_break="\\n\\n", bare=False)  # ChatGLM Efficient Tuning since June 2023
CHATGLM2 = _fill(
    _ROUNDS,
    HEAD="[gMASK]<sop>",
    TAIL="",
    ANSWER='(" " ~ message.content if message.content else "")',
    HISTORY="{% generation %}{{ message.content }}{% endgeneration %}",
    BARE="false",
    FIRST="1",
    BREAK="\\n\\n",
)

_ROLES = """
{{- "@HEAD@" }}
@TOOLS@
{%- for message in messages %}
{%- set role = "observation" if message.role == "tool" else message.role %}
{%- if role not in ["system", "user", "assistant", "observation"] %}
{{- raise_exception("message " ~ loop.index ~ ": role must be system, user, assistant, observation or tool, not '"
    ~ role ~ "'") }}
{%- endif %}
{%- if message.content is not string %}
{{- raise_exception("message " ~ loop.index ~ ": content must be a string") }}
{%- endif %}
{%- if message.tool_calls %}
{{- raise_exception("message " ~ loop.index ~ ": give a tool call as metadata (the tool's name) and content") }}
{%- endif %}
@MESSAGE_TOOLS@
{%- set text = (message.metadata or "") ~ "\\n" ~ ("@BLANK@" ~ content if content else "") %}
{%- if loop.previtem is defined and loop.previtem.role == "assistant" %}
{%- generation %}{{ "<|" ~ role ~ "|>" }}{% endgeneration %}
{%- else %}
{{- "<|" ~ role ~ "|>" }}
{%- endif %}
{%- if role == "assistant" %}
{%- generation %}{{ text ~ (eos_token if loop.last and not add_generation_prompt else "") }}{% endgeneration %}
{%- else %}
{{- text }}
{%- endif %}
{%- endfor %}
{{- "<|assistant|>" if add_generation_prompt else "" }}
"""

# ChatGLM3 reads its tools as a JSON list at the end of the system message.
CHATGLM3 = _fill(
    _ROLES,
    TOOLS="""
{%- set given = namespace(tools=[]) %}
{%- for tool in tools or [] %}
{%- set given.tools = given.tools + [tool.function if tool.function is defined else tool] %}
{%- endfor %}
{%- if given.tools and messages[0].role != "system" %}
{{- "<|system|>\\n Answer the following questions as best as you can. You have access to the following tools:\\n"
    ~ given.tools | tojson(indent=4) }}
{%- endif %}""".lstrip(),
    MESSAGE_TOOLS="""
{%- set content = message.content %}
{%- set listed = message.tools or (given.tools if loop.first else []) %}
{%- if role == "system" and listed %}
{%- set content = content ~ "\\n" ~ listed | tojson(indent=4) %}
{%- endif %}""".lstrip(),
    HEAD="[gMASK]<sop>",
    BLANK=" ",
)

# GLM-4 describes its tools in a system message of its own.
GLM4 = _fill(
    _ROLES,
    TOOLS="""
{%- macro tools_message(tools) %}
{{- "<|system|>\\n你是一个名为 ChatGLM 的人工智能助手。你是基于智谱AI训练的语言模型 GLM-4 模型开发的，"
    ~ "你的任务是针对用户的问题和要求提供适当的答复和支持。\\n\\n# 可用工具" }}
{%- for tool in tools %}
{%- set function = tool.function if tool.function is defined else tool %}
{{- "\\n\\n## " ~ function.name ~ "\\n\\n" ~ function | tojson(indent=4)
    ~ "\\n在调用上述函数时，请使用 Json 格式表示调用的参数。" }}
{%- endfor %}
{%- endmacro %}
{{- tools_message(tools) if tools else "" }}""".lstrip(),
    MESSAGE_TOOLS="""
{%- set content = message.content %}
{{- tools_message(message.tools) if message.tools else "" }}""".lstrip(),
    HEAD="[gMASK]<sop>",
    BLANK="",
)

CHAT_TEMPLATES = {"chatglm1": CHATGLM1, "chatglm2": CHATGLM2, "chatglm3": CHATGLM3, "glm4": GLM4}
"""The authors' prompt format of each generation."""
