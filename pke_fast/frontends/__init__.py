"""pke_fast under the names, arguments and results of other tools: `easyedit` and `safetune`; see docs/frontends.md."""
