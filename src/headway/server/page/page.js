// The page: a playground, what became of its requests, and the engine as it works.
// Talks to its own server only, through the same API as everybody else.

import { look } from "./live.js";
import { prepareShow } from "./show.js";
import { preparePlayground } from "./playground.js";

preparePlayground();
prepareShow();
look();
