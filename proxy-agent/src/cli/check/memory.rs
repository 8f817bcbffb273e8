//! What the maps cost in kernel memory.

use std::collections::BTreeMap;

use aya_obj::generated::bpf_map_type;

use crate::cli::table::Table;
use crate::dataplane::load::Shape;

/// `struct htab_elem` before its key, and `struct bucket` (kernel/bpf/hashtab.c).
const ELEMENT: u64 = 48;
const BUCKET: u64 = 16;
const NO_PREALLOC: u32 = 1;
/// `struct lpm_trie_node` before its data (kernel/bpf/lpm_trie.c): two children, prefix length and flags.
const TRIE_NODE: u64 = 24;

/// Bytes that a map takes when it is made, and at most.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Cost {
    at_start: u64,
    at_most: u64,
}

fn cost(shape: &Shape, cpus: u64) -> Cost {
    let round = |bytes: u32| u64::from(bytes).div_ceil(8) * 8;
    let entries = u64::from(shape.max_entries);
    let (key, value) = (round(shape.key_size), round(shape.value_size));
    let all = |bytes: u64| Cost { at_start: bytes, at_most: bytes };
    match bpf_map_type::try_from(shape.kind) {
        Ok(bpf_map_type::BPF_MAP_TYPE_HASH | bpf_map_type::BPF_MAP_TYPE_LRU_HASH) => {
            let buckets = entries.next_power_of_two() * BUCKET;
            let elements = entries * (ELEMENT + key + value);
            let at_start = if shape.flags & NO_PREALLOC == 0 { buckets + elements } else { buckets };
            Cost { at_start, at_most: buckets + elements }
        }
        Ok(bpf_map_type::BPF_MAP_TYPE_LPM_TRIE) => {
            // Between n networks stand at most n - 1 nodes of the tree's own. The key begins with the prefix length, which
            // the node counts as its own.
            let node = (TRIE_NODE + u64::from(shape.key_size) - 4 + u64::from(shape.value_size)).next_power_of_two();
            Cost { at_start: 0, at_most: (2 * entries).saturating_sub(1) * node }
        }
        Ok(bpf_map_type::BPF_MAP_TYPE_PERCPU_ARRAY) => all(entries * value * cpus),
        _ => all(entries * value),
    }
}

/// A table of all maps with their sum.
pub(super) fn table(shapes: &BTreeMap<String, Shape>) -> String {
    let cpus = aya::util::nr_cpus().map_or(1, |cpus| cpus as u64);
    let mut table = Table::new(&["MAP", "ENTRIES", "AT START", "AT MOST"]);
    let mut sum = Cost::default();
    for (name, shape) in shapes {
        let cost = cost(shape, cpus);
        sum = Cost { at_start: sum.at_start + cost.at_start, at_most: sum.at_most + cost.at_most };
        table.row(vec![name.clone(), shape.max_entries.to_string(), kib(cost.at_start), kib(cost.at_most)]);
    }
    table.row(vec!["sum".to_owned(), String::new(), kib(sum.at_start), kib(sum.at_most)]);
    table.to_string()
}

fn kib(bytes: u64) -> String {
    format!("{} KiB", bytes.div_ceil(1024))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shape(kind: bpf_map_type, key_size: u32, value_size: u32, max_entries: u32, flags: u32) -> Shape {
        Shape { kind: kind as u32, key_size, value_size, max_entries, flags }
    }

    #[test]
    fn a_preallocated_hash_costs_what_the_kernel_says() {
        // `bpftool map show` of 262,144 entries of 16 and 48 bytes says 33,555,568: the rest are the map's own fields.
        let flows = cost(&shape(bpf_map_type::BPF_MAP_TYPE_HASH, 16, 48, 262_144, 0), 2);
        assert_eq!(flows, Cost { at_start: 33_554_432, at_most: 33_554_432 });
    }

    #[test]
    fn a_sparse_hash_costs_its_buckets_at_first() {
        let services = cost(&shape(bpf_map_type::BPF_MAP_TYPE_HASH, 8, 8, 1_000, NO_PREALLOC), 2);
        assert_eq!(services, Cost { at_start: 1_024 * 16, at_most: 1_024 * 16 + 1_000 * 64 });
    }

    #[test]
    fn a_trie_costs_what_stands_in_it_and_the_nodes_between() {
        // Keys of 12 and 24 bytes, values of 4: nodes of 36 and 48 bytes, taken from the kernel's caches of 64.
        let ranges = cost(&shape(bpf_map_type::BPF_MAP_TYPE_LPM_TRIE, 12, 4, 1_000, 1), 2);
        assert_eq!(ranges, Cost { at_start: 0, at_most: 1_999 * 64 });
        let ranges = cost(&shape(bpf_map_type::BPF_MAP_TYPE_LPM_TRIE, 24, 4, 1, 1), 2);
        assert_eq!(ranges.at_most, 64);
    }

    #[test]
    fn per_cpu_values_cost_once_per_cpu() {
        let stats = cost(&shape(bpf_map_type::BPF_MAP_TYPE_PERCPU_ARRAY, 4, 16, 10, 0), 4);
        assert_eq!(stats.at_start, 640);
    }
}
