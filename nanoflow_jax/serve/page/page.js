// Starts the page: which view is shown, the models, and the state of the server.

import { ApiError, getJson } from "./api.js";
import { byId, setText } from "./dom.js";
import { Engine } from "./engine.js";
import { Playground } from "./playground.js";

const VIEWS = ["playground", "engine"];

function start() {
  let models = [];
  let loading = false;
  const playground = new Playground();
  const engine = new Engine({
    onStats(stats) {
      setState(stats.status);
      playground.needsKey = stats.needs_key;
      if (models.length === 0 && stats.status !== "starting") loadModels();
    },
    onLost(error) {
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
      if (error.status !== 503) playground.showProblem(error);
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
