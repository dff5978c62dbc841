let messages = [];
let running = null;

function fail(text) {
  element("banner-text").textContent = text;
  element("banner").hidden = false;
}

function settle() {
  element("banner").hidden = true;
}

/** What the server says went wrong, or the status where it says nothing. */
async function reasonOf(response) {
  const text = await response.text();
  try {
    return JSON.parse(text).error.message;
  } catch {
    return `the server answered with status ${response.status}`;
  }
}

function addMessage(role, text) {
  element("welcome").hidden = true;
  const message = document.createElement("article");
  message.className = `message ${role}`;
  const who = document.createElement("p");
  who.className = "who";
  who.textContent = role === "user" ? "You" : "Model";
  const body = document.createElement("div");
  body.className = "body";
  const content = document.createTextNode(text);
  body.append(content);
  message.append(who, body);
  element("messages").append(message);
  const scroll = element("scroll");
  scroll.scrollTop = scroll.scrollHeight;
  return { message, body, content };
}

function addThinking(view, text) {
  if (!view.thinking) {
    view.thinking = document.createElement("div");
    view.thinking.className = "thinking";
    view.message.insertBefore(view.thinking, view.body);
  }
  view.thinking.append(document.createTextNode(text));
}

/** The data of every server-sent event, as it comes. */
async function* events(body) {
  const decoder = new TextDecoder();
  let pending = "";
  for await (const bytes of chunksOf(body)) {
    pending += decoder.decode(bytes, { stream: true });
    const whole = pending.split(/\r?\n\r?\n/);
    pending = whole.pop();
    for (const event of whole) {
      const lines = event.split(/\r?\n/).filter((line) => line.startsWith("data:"));
      if (lines.length) {
        yield lines.map((line) => line.slice(5).trimStart()).join("\n");
      }
    }
  }
}

async function* chunksOf(body) {
  const reader = body.getReader();
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) {
        return;
      }
      yield value;
    }
  } finally {
    reader.releaseLock();
  }
}

function requestBody() {
  const system = element("system").value.trim();
  const head = system ? [{ role: "system", content: system }] : [];
  const body = {
    messages: [...head, ...messages],
    stream: true,
    stream_options: { include_usage: true },
  };
  const model = element("model").dataset.name;
  if (model) {
    body.model = model;
  }
  for (const [id, field] of [["temperature", "temperature"], ["max-tokens", "max_completion_tokens"]]) {
    const input = element(id);
    if (input.value !== "") {
      body[field] = input.valueAsNumber;
    }
  }
  return JSON.stringify(body);
}

function followEnd(change) {
  const scroll = element("scroll");
  const atEnd = scroll.scrollHeight - scroll.scrollTop - scroll.clientHeight < 60;
  change();
  if (atEnd) {
    scroll.scrollTop = scroll.scrollHeight;
  }
}

/** Read one answer into its view. Returns its finish reason, usage and the first token's time. */
async function readAnswer(response, view) {
  const result = { reason: null, usage: null, first: null };
  for await (const data of events(response.body)) {
    if (data === "[DONE]") {
      break;
    }
    const chunk = JSON.parse(data);
    if (chunk.error) {
      throw new Error(chunk.error.message);
    }
    result.usage = chunk.usage ?? result.usage;
    for (const choice of chunk.choices) {
      const { content, reasoning_content: thinking } = choice.delta;
      if (content || thinking) {
        result.first ??= performance.now();
      }
      followEnd(() => {
        if (thinking) {
          addThinking(view, thinking);
        }
        if (content) {
          view.content.appendData(content);
        }
      });
      result.reason = choice.finish_reason ?? result.reason;
    }
  }
  if (result.reason === null) {
    throw new Error("the connection ended before the answer was complete");
  }
  return result;
}

function describe({ reason, usage, first }, began) {
  const facts = [];
  const tokens = usage?.completion_tokens;
  if (tokens) {
    facts.push(`${tokens} tokens`);
    const seconds = (performance.now() - first) / 1000;
    if (tokens > 1 && first !== null && seconds > 0) {
      facts.push(`${((tokens - 1) / seconds).toFixed(1)} tok/s`);
    }
  }
  if (first !== null) {
    facts.push(`first token after ${Math.round(first - began)} ms`);
  }
  if (reason === "length") {
    facts.push("cut at the limit of tokens");
  }
  return facts.join(" · ");
}

function addFacts(view, text) {
  const facts = document.createElement("p");
  facts.className = "facts";
  facts.textContent = text;
  followEnd(() => view.message.append(facts));
  element("announcer").textContent = `Answer: ${text}`;
}

function setRunning(controller) {
  running = controller;
  element("send").hidden = controller !== null;
  element("stop").hidden = controller === null;
}

async function send(text) {
  settle();
  const controller = new AbortController();
  setRunning(controller);
  const question = { role: "user", content: text };
  messages.push(question);
  const asked = addMessage("user", text);
  const view = addMessage("assistant", "");
  view.message.setAttribute("aria-busy", "true");
  const began = performance.now();
  try {
    const response = await fetch("v1/chat/completions", {
      method: "POST",
      headers: { "content-type": "application/json", ...authorization() },
      body: requestBody(),
      signal: controller.signal,
    });
    if (!response.ok) {
      throw new Error(await reasonOf(response));
    }
    const result = await readAnswer(response, view);
    addFacts(view, describe(result, began));
  } catch (error) {
    if (controller.signal.aborted) {
      addFacts(view, "stopped");
    } else {
      const reason = error instanceof TypeError ? "the server cannot be reached" : error.message;
      fail(`No answer: ${reason}`);
      addFacts(view, "not complete");
    }
  }
  view.message.removeAttribute("aria-busy");
  // A new chat began meanwhile: this one is gone.
  if (running !== controller) {
    return;
  }
  setRunning(null);
  if (view.content.data) {
    messages.push({ role: "assistant", content: view.content.data });
  } else {
    messages = messages.filter((message) => message !== question);
    if (!element("banner").hidden) {
      asked.message.remove();
      view.message.remove();
      element("prompt").value ||= text;
      fitPrompt();
    }
  }
  element("prompt").focus();
}

function newChat() {
  running?.abort();
  setRunning(null);
  settle();
  messages = [];
  element("messages").replaceChildren();
  element("welcome").hidden = false;
  element("prompt").focus();
}

function fitPrompt() {
  const prompt = element("prompt");
  prompt.rows = Math.min(10, prompt.value.split("\n").length);
}

function submit() {
  const prompt = element("prompt");
  const text = prompt.value.trim();
  const invalid = ["temperature", "max-tokens"].map(element).find((input) => !input.validity.valid);
  if (invalid) {
    invalid.closest("details").open = true;
    invalid.reportValidity();
  } else if (text && running === null) {
    prompt.value = "";
    fitPrompt();
    send(text);
  }
}

async function readModel() {
  try {
    const response = await fetch("v1/models", { headers: authorization(), cache: "no-store" });
    if (!response.ok) {
      throw new Error(await reasonOf(response));
    }
    const { data } = await response.json();
    const model = element("model");
    model.textContent = model.dataset.name = data[0].id;
    document.title = `${data[0].id} · qwen-run`;
    settle();
  } catch (error) {
    fail(error instanceof TypeError ? "The server cannot be reached." : `Note: ${error.message}`);
  }
}

element("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  submit();
});
element("settings").addEventListener("submit", (event) => event.preventDefault());
element("prompt").addEventListener("input", fitPrompt);
element("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    submit();
  }
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") {
    running?.abort();
  }
});
element("stop").addEventListener("click", () => running?.abort());
element("new-chat").addEventListener("click", newChat);
element("banner-close").addEventListener("click", settle);
for (const idea of document.querySelectorAll(".idea")) {
  idea.addEventListener("click", () => running ?? send(idea.textContent));
}

const keyField = element("api-key");
keyField.value = sessionStorage.getItem("qwen-run-api-key") ?? "";
keyField.addEventListener("change", () => {
  sessionStorage.setItem("qwen-run-api-key", keyField.value.trim());
  readModel();
});
if (matchMedia("(max-width: 820px)").matches) {
  for (const card of document.querySelectorAll("details.card")) {
    card.open = false;
  }
}
readModel();
watch();
