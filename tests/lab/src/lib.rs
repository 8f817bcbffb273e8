//! A small cluster in network namespaces: node, pods, external host; servers, clients and captures.
