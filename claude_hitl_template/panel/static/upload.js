(() => {
  const CHUNK = 1 << 20;
  const box = document.getElementById("hitl-upload"), pick = document.getElementById("hitl-pick");
  const kept = document.getElementById("hitl-files"), list = document.getElementById("hitl-list");
  const state = kept.value ? JSON.parse(kept.value) : {batch: null, items: {}, names: {}, bytes: 0};
  const limit = Number(box.dataset.limit), buttons = () => document.querySelectorAll("button[type=submit]");
  const post = async (url, body) => {
    const plain = body instanceof FormData;
    const headers = plain ? {} : {"Content-Type": "application/json"};
    const answer = await fetch(url, {method: "POST", headers, body: plain ? body : JSON.stringify(body ?? {})});
    if (!answer.ok) throw new Error(answer.status);
    return answer.json();
  };
  const upload = async (file) => {
    state.batch ??= (await post("/files/init_batch")).batch_id;
    const filename = String(Object.keys(state.names).length), total = Math.ceil(file.size / CHUNK);
    const {upload_id} = await post("/files/init", {filename, total_chunks: total, batch_id: state.batch});
    for (let i = 0; i < total; i++) {
      const form = new FormData();
      form.append("upload_id", upload_id);
      form.append("chunk_number", i);
      form.append("chunk", file.slice(i * CHUNK, (i + 1) * CHUNK));
      if ((await post("/files/chunk", form)).error) throw new Error("chunk");
    }
    state.items[upload_id] = {filename, totalChunks: total};
    state.names[filename] = file.name;
    state.bytes += file.size;
    kept.value = JSON.stringify(state);
  };
  const add = async (file) => {
    const entry = document.createElement("li");
    entry.textContent = file.name;
    list.append(entry);
    if (state.bytes + file.size > limit) return entry.append(": left out, this is over the limit");
    try { await upload(file); entry.append(": uploaded"); }
    catch (error) { entry.append(": not uploaded, choose it again"); }
  };
  for (const name of Object.values(state.names)) {
    const entry = document.createElement("li");
    entry.textContent = name + ": uploaded";
    list.append(entry);
  }
  pick.addEventListener("change", async () => {
    buttons().forEach((button) => button.disabled = true);
    for (const file of pick.files) await add(file);
    pick.value = "";
    buttons().forEach((button) => button.disabled = false);
  });
})();
