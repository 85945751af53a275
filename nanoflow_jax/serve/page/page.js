// Starts the page: which view is shown, the key, the models, and the state of the server.

import { ApiError, getJson, getKey, setKey } from "./api.js";
import { byId, setText } from "./dom.js";
import { Engine } from "./engine.js";
import { Playground } from "./playground.js";

const VIEWS = ["playground", "engine"];

function start() {
  let models = [];
  let loading = false;
  const playground = new Playground({ onRefused: () => openKey(true) });
  const engine = new Engine({
    onStats(stats) {
      setState(stats.status);
      if (models.length === 0 && stats.status !== "starting") loadModels();
    },
    onLost(error) {
      if (error.status === 401) openKey(true);
      setState(error.status === 401 ? "key needed" : error.status ? "no figures" : "unreachable");
    },
  });

  async function loadModels() {
    if (loading) return;
    loading = true;
    try {
      const answer = await getJson("v1/models");
      models = answer.data.map((model) => model.id);
      playground.setModels(models);
      setText(byId("model-name"), models.length === 1 ? models[0] : `${models.length} models`);
    } catch (error) {
      if (!(error instanceof ApiError)) throw error;
      if (error.status === 401) openKey(true);
      else if (error.status !== 503) playground.showProblem(error);
    } finally {
      loading = false;
    }
  }

  function showView() {
    const wanted = location.hash.slice(1);
    const shown = VIEWS.includes(wanted) ? wanted : VIEWS[0];
    for (const name of VIEWS) {
      byId(`view-${name}`).hidden = name !== shown;
      if (name === shown) byId(`tab-${name}`).setAttribute("aria-current", "page");
      else byId(`tab-${name}`).removeAttribute("aria-current");
    }
    document.title = `${shown === "engine" ? "Engine" : "Playground"} · nanoflow_jax`;
    if (shown === "engine") engine.redraw();
  }

  listenToKey(() => {
    engine.pollNow();
    loadModels();
  });
  foldParameters();
  window.addEventListener("hashchange", showView);
  showView();
  engine.pollNow();
  loadModels();
}

function setState(state) {
  const pill = byId("state");
  pill.dataset.state = state;
  setText(pill, state);
}

function openKey(open) {
  byId("key-panel").hidden = !open;
  byId("key-button").setAttribute("aria-expanded", open);
}

function listenToKey(onChange) {
  const field = byId("key");
  field.value = getKey();
  byId("key-button").addEventListener("click", () => {
    openKey(byId("key-panel").hidden);
    if (!byId("key-panel").hidden) field.focus();
  });
  field.addEventListener("input", () => field.setCustomValidity(""));
  byId("key-panel").addEventListener("submit", (event) => {
    event.preventDefault();
    try {
      setKey(field.value.trim());
    } catch (error) {
      field.setCustomValidity(error.message);
      field.reportValidity();
      return;
    }
    openKey(false);
    byId("key-button").focus();
    onChange();
  });
}

/** The parameters lie open beside the conversation, and folded above it on a phone. */
function foldParameters() {
  const wide = window.matchMedia("(min-width: 900px)");
  const fold = () => {
    byId("parameters").open = wide.matches;
  };
  wide.addEventListener("change", fold);
  fold();
}

start();
