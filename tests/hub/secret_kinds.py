"""Secrets of many kinds, made at random when they are asked for, and texts that hold none.

No line of this file is a secret or looks like one: a kind is written as its parts. What issuers put
into a token (checksums, lengths, fixed middles) is there, since good detectors look at it.
"""

import base64
import binascii
import hashlib
import json
import random
import string
import uuid

ALNUM = string.ascii_letters + string.digits
UPPER = string.ascii_uppercase + string.digits
LOWER = string.ascii_lowercase + string.digits
HEX = "0123456789abcdef"
WORD, URLSAFE = ALNUM + "_", ALNUM + "-_"
NONZERO = "123456789"
BASE64 = ALNUM + "+/"


def _base62_checksum(body):
    """Six base-62 digits of the CRC-32, as GitHub's and npm's tokens end in."""
    digits = string.digits + string.ascii_uppercase + string.ascii_lowercase
    rest, found = binascii.crc32(body.encode()), ""
    for _ in range(6):
        rest, last = divmod(rest, 62)
        found = digits[last] + found
    return found


def _standard(raw):
    return base64.b64encode(raw).decode()


def _encoded(raw):
    return base64.urlsafe_b64encode(raw).decode().rstrip("=")


def kinds(seed=0):
    """`{kind: secret}`, other ones for each seed. A kind's secret may be an assignment or a URL."""
    rng = random.Random(seed)

    def draw(count, alphabet=ALNUM):
        return "".join(rng.choice(alphabet) for _ in range(count))

    def raw(count):
        return bytes(rng.randrange(256) for _ in range(count))

    def checked(start, count):
        body = draw(count)
        return start + body + _base62_checksum(body)

    def pem(what, count):
        body = base64.encodebytes(raw(count)).decode()
        return f"-----BEGIN {what}-----\n{body}-----END {what}-----"

    word = draw(4, string.ascii_letters) + draw(6, string.digits) + draw(6) + "!"
    dash = "-"
    jwt = ".".join(
        [
            _encoded(b'{"alg":"HS256","typ":"JWT"}'),
            _encoded(json.dumps({"sub": draw(10), "iat": 1700000000, "name": "a"}).encode()),
            _encoded(raw(32)),
        ]
    )
    service_account = {
        "type": "service_account",
        "project_id": "shop-" + draw(6, LOWER),
        "private_key_id": draw(40, HEX),
        "private_key": pem("PRIVATE" + " KEY", 1190),
        "client_email": "robot@shop.iam.gserviceaccount.com",
    }
    return {
        "huggingface": "hf" + "_" + draw(34, string.ascii_letters),
        "huggingface-org": "api" + "_org_" + draw(34, string.ascii_letters),
        "openai-project": "sk" + "-proj-" + draw(74, URLSAFE) + "T3Bl" + "bkFJ" + draw(74, URLSAFE),
        "openai-legacy": "sk" + dash + draw(20) + "T3Bl" + "bkFJ" + draw(20),
        "anthropic": "sk" + "-ant-api03-" + draw(93, URLSAFE) + "AA",
        "openrouter": "sk" + "-or-v1-" + draw(64, HEX),
        "groq": "gsk" + "_" + draw(20) + "WGdyb3" + "FY" + draw(24),
        "replicate": "r8" + "_" + draw(37),
        "wandb": "WANDB_API_KEY=" + draw(40, HEX),
        "aws-access-key": "AKIA" + draw(16, string.ascii_uppercase + "234567"),
        "aws-secret": "aws_secret_access_key = " + draw(40, BASE64),
        "aws-session": "AWS_SESSION_TOKEN=" + "IQoJ" + draw(380, BASE64),
        "github": checked("ghp" + "_", 30),
        "github-oauth": checked("gho" + "_", 30),
        "github-fine": "github" + "_pat_" + draw(22) + "_" + draw(59),
        "gitlab": "glpat" + dash + draw(20, WORD),
        "gitlab-runner": "glrt" + dash + draw(20, ALNUM),
        "npm": checked("npm" + "_", 30),
        "pypi": "pypi" + dash + "AgEI" + "cHlwaS5vcmc" + draw(160, URLSAFE),
        "docker": "dckr" + "_pat_" + draw(27, WORD),
        "stripe": "sk" + "_live_" + draw(99),
        "stripe-restricted": "rk" + "_live_" + draw(99),
        "sendgrid": "SG" + "." + draw(22) + "." + draw(43),
        "slack-bot": dash.join(["xox" + "b", draw(12, NONZERO), draw(13, NONZERO), draw(24)]),
        "slack-hook": "https://hooks.slack.com/services/"
        + "/".join(["T" + draw(8, UPPER), "B" + draw(10, UPPER), draw(24)]),
        "discord-hook": f"https://discord.com/api/webhooks/1{draw(18, string.digits)}/{draw(68)}",
        "telegram": draw(10, NONZERO) + ":AA" + draw(33, WORD),
        "twilio": "SK" + draw(32, HEX) + " TWILIO_AUTH_TOKEN=" + draw(32, HEX),
        "jwt": jwt,
        "azure-storage": "DefaultEndpointsProtocol=https;AccountName=shop"
        + draw(6, LOWER)
        + ";AccountKey="
        + _standard(raw(64))
        + ";EndpointSuffix=core.windows.net",
        "azure-client": "AZURE_CLIENT_SECRET=" + draw(3) + "8Q~" + draw(34),
        "google": "AIza" + "Sy" + draw(33, WORD),
        "google-account": json.dumps(service_account),
        "google-oauth": "GOCSPX" + dash + draw(28),
        "rsa-key": pem("RSA PRIVATE" + " KEY", 1190),
        "openssh-key": pem("OPENSSH PRIVATE" + " KEY", 400),
        "pgp-key": pem("PGP PRIVATE" + " KEY BLOCK", 900),
        "age-key": "AGE-SECRET" + "-KEY-1" + draw(58, "QPZRY9X8GF2TVDW0S3JN54KHCE6MUA7L"),
        "postgres-url": f"postgresql://shop:{word}@db.shop-{draw(4, LOWER)}.com:5432/orders",
        "mongodb-url": f"mongodb+srv://shop:{draw(16)}@c0.{draw(5, LOWER)}.mongodb.net/orders",
        "redis-url": f"redis://:{draw(20)}@cache.shop-{draw(4, LOWER)}.com:6379/0",
        "https-url": f"https://robot:{draw(20)}@git.shop-{draw(4, LOWER)}.com/shop.git",
        "mailgun": "MAILGUN_API_KEY=key" + dash + draw(32, HEX),
        "mailchimp": "MAILCHIMP_API_KEY=" + draw(32, HEX) + "-us12",
        "shopify": "shpat" + "_" + draw(32, HEX),
        "digitalocean": "dop" + "_v1_" + draw(64, HEX),
        "databricks": "dapi" + draw(32, HEX),
        "cloudflare": "CLOUDFLARE_API_TOKEN=" + draw(40, WORD),
        "heroku": "HRKU" + dash + "AA" + draw(58, WORD),
        "vault": "hvs" + "." + "CAES" + "I" + draw(90, WORD),
        "terraform": draw(14) + "." + "atlasv1" + "." + draw(67),
        "notion": "ntn" + "_" + draw(11, string.digits) + draw(35),
        "linear": "lin" + "_api_" + draw(40),
        "atlassian": "ATATT3" + "xFfGF0" + draw(172, WORD) + "=" + draw(8, UPPER),
        "grafana": "glsa" + "_" + draw(32) + "_" + draw(8, HEX),
        "newrelic": "NRAK" + dash + draw(27, UPPER),
        "sentry": "sntryu" + "_" + draw(64, HEX),
        "supabase": "sbp" + "_" + draw(40, HEX),
        "square": "sq0csp" + dash + draw(43, WORD),
        "kaggle": json.dumps({"username": "ann", "key": draw(32, HEX)}),
        "password": f'db_password = "{word}"',
        "pwd": f"SHOP_DB_PWD={word}",
        "basic-header": "Authorization: Basic " + _standard(f"robot:{word}".encode()),
        "bearer-header": "Authorization: Bearer " + draw(40),
        "netrc": f"machine git.shop.com login robot password {word}",
    }


def inside(secret):
    """`{how: line}`: a JSONL record that holds a secret in running text, in code, in escapes."""
    escaped = "".join(f"\\u{ord(c):04x}" if c.isalnum() and i % 3 == 0 else c
                      for i, c in enumerate(secret.replace("\\", "\\\\").replace('"', '\\"')
                                            .replace("\n", "\\n")))  # fmt: skip
    return {
        "text": json.dumps({"prompt": "Help", "output": f"Try this one:\n{secret}\nIt works."}),
        "code": json.dumps({"prompt": "Help", "output": f"```\nimport os\n  {secret}\n```"}),
        "escaped": '{"prompt": "Help", "output": "Try this:\\n' + escaped + '\\nIt works."}',
    }


def harmless(seed=0):
    """`{kind: text}` of what checkpoints and data sets hold that is no secret."""
    rng = random.Random(seed)

    def raw(count):
        return bytes(rng.randrange(256) for _ in range(count))

    def sha():
        return hashlib.sha256(raw(8)).hexdigest()

    def row(**fields):
        return json.dumps(fields)

    names = ["Ann", "Ben", "Cy", "Dee"]
    sums = []
    for _ in range(200):
        a, b = rng.randrange(2, 99), rng.randrange(2, 99)
        who = rng.choice(names)
        sums.append(
            row(
                question=f"{who} sells {a} clips in April and {b} in May. How many in all?",
                answer=f"{who} sells {a}+{b} = <<{a}+{b}={a + b}>>{a + b} clips.\n#### {a + b}",
            )
        )
    code = [
        'import os\nclient = OpenAI(api_key=os.environ["OPENAI_API_KEY"])',
        'password = input("Password: ")\nif password == stored_password: login(user, password)',
        "token = tokenizer.eos_token\npad_token_id = tokenizer.pad_token_id",
        'parser.add_argument("--api-key", default=None, help="Your API key")',
        'export HF_TOKEN=<your-token>\nexport OPENAI_API_KEY="your-api-key-here"',
        'headers = {"Authorization": f"Bearer {token}"}',
        "def reset_password(self, new_password: str) -> None:\n    self.password = new_password",
        "secret_key = secrets.token_hex(32)  # a new one each time",
        'login(token="hf' + '_xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx")',
        "ssh git@github.com and mail me@example.org; https://example.org/a?b=c#d",
        "aws_access_key_id = AKIA" + "IOSFODNN7" + "EXAMPLE",
        "https://example.org/sk" + "-how-to-write-a-very-long-slug-in-2024",
        "conda install -c conda-forge task-1234567890123456789012",
        "The password must have 12 characters, a digit and one of !@#$%.",
        "DATABASE_URL=postgresql://localhost:5432/mydatabase",
        "The key insight: secret sharing over GF(2^8) needs k of n shares.",
    ]
    image = base64.b64encode(raw(6000)).decode()
    return {
        "gsm8k": "\n".join(sums),
        "code": "\n".join(row(prompt="Write it", output=text) for text in code),
        "manifest": json.dumps(
            {
                "outputs": {
                    f"model-{i:05d}.safetensors": {"sha256": sha(), "bytes": rng.randrange(10**9)}
                    for i in range(200)
                },
                "config": {"reward_token": "[UNUSED_TOKEN_130]", "seed": 7},
            },
            indent=2,
        ),
        "uuids": "\n".join(
            row(id=str(uuid.UUID(bytes=raw(16))), trace=sha()[:32], prompt="x") for _ in range(300)
        ),
        "git": "\n".join(f"{sha()[:40]} {sha()[:40]} refs/pull/{i}/head" for i in range(300)),
        "image": "\n".join(
            row(prompt=[{"type": "image_url", "image_url": f"data:image/png;base64,{image[i:]}"}])
            for i in range(20)
        ),
        "metrics": "\n".join(
            row(step=i, loss=rng.random(), **{"val/accuracy": rng.random(), "tokens": i * 4096})
            for i in range(400)
        ),
        "config": json.dumps(
            {
                "architectures": ["LlamaForSequenceClassification"],
                "bos_token_id": 1,
                "eos_token": "</s>",
                "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
                "auto_map": {},
                "_name_or_path": "internlm/POLAR-7B",
                "tokenizer_class": "PreTrainedTokenizerFast",
            },
            indent=2,
        ),
        "header": json.dumps(
            {
                f"model.layers.{i}.self_attn.{n}_proj.weight": {
                    "dtype": "BF16",
                    "shape": [4096, 4096],
                    "data_offsets": [i * 33554432, (i + 1) * 33554432],
                }
                for i in range(64)
                for n in "qkvo"
            }
        ),
    }
