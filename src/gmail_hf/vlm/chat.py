"""Chat templates: Llama 3's format, and images in the template of a text-only model."""

IMAGE_TOKEN = "<image>"

# The format in Meta's Llama 3 model card. The instruct models have a template for it, the base models do not.
LLAMA3_CHAT_TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {{- message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
LLAMA3_HEADER_TOKENS = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")

# Contents that are lists of items become text as in LLaVA, with the image token and a line break for each image.
# Contents that are text do not change.
FLATTEN_CONTENTS = """\
{%- set flat = namespace(messages=[]) -%}
{%- for message in messages -%}
    {%- if message['content'] is string or message['content'] is not iterable -%}
        {%- set flat.messages = flat.messages + [message] -%}
    {%- else -%}
        {%- set content = namespace(text='') -%}
        {%- for item in message['content'] -%}
            {%- if item['type'] == 'image' -%}
                {%- set content.text = content.text + 'IMAGE_TOKEN\\n' -%}
            {%- elif item['type'] == 'text' -%}
                {%- set content.text = content.text + item['text'] -%}
            {%- else -%}
                {{- raise_exception('A message has an item of type ' ~ item['type'] ~ ', not text or image.') -}}
            {%- endif -%}
        {%- endfor -%}
        {%- set flat.messages = flat.messages + [dict(message, content=content.text)] -%}
    {%- endif -%}
{%- endfor -%}
{%- set messages = flat.messages -%}
""".replace("IMAGE_TOKEN", IMAGE_TOKEN)


def with_images(chat_template: str) -> str:
    """Extend a chat template for text messages to messages with lists of text and image items."""
    return FLATTEN_CONTENTS + chat_template
