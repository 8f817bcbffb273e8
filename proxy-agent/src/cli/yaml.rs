//! Rows as YAML. What JSON has, in block style: a few lines, and no library for them.

use serde_json::Value;

/// A document.
pub(super) fn document(value: &Value) -> String {
    let mut text = String::new();
    node(&mut text, value, 0);
    text
}

/// Writes a value whose first line is begun already, so far that its own text is next.
fn node(text: &mut String, value: &Value, depth: usize) {
    match value {
        Value::Array(items) if !items.is_empty() => {
            for (n, item) in items.iter().enumerate() {
                pad(text, if n == 0 { 0 } else { depth });
                text.push_str("- ");
                node(text, item, depth + 1);
            }
        }
        Value::Object(fields) if !fields.is_empty() => {
            for (n, (key, field)) in fields.iter().enumerate() {
                pad(text, if n == 0 { 0 } else { depth });
                text.push_str(&scalar(&Value::String(key.clone())));
                text.push(':');
                // The dashes of a list stand below its key.
                let inner = depth + usize::from(field.is_object());
                if is_block(field) {
                    text.push('\n');
                    pad(text, inner);
                } else {
                    text.push(' ');
                }
                node(text, field, inner);
            }
        }
        other => {
            text.push_str(&scalar(other));
            text.push('\n');
        }
    }
}

fn is_block(value: &Value) -> bool {
    match value {
        Value::Array(items) => !items.is_empty(),
        Value::Object(fields) => !fields.is_empty(),
        _ => false,
    }
}

fn pad(text: &mut String, depth: usize) {
    (0..depth).for_each(|_| text.push_str("  "));
}

/// JSON's own text is YAML's, too; a word that YAML reads as nothing else goes without quotes.
fn scalar(value: &Value) -> String {
    match value {
        Value::String(word) if is_plain(word) => word.clone(),
        other => other.to_string(),
    }
}

fn is_plain(word: &str) -> bool {
    const MEANT: [&str; 10] = ["true", "false", "null", "yes", "no", "on", "off", "y", "n", "none"];
    word.starts_with(|first: char| first.is_ascii_alphabetic())
        && word.chars().all(|c| c.is_ascii_alphanumeric() || "_-./@".contains(c))
        && (word == "none" || !MEANT.contains(&word.to_ascii_lowercase().as_str()))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn rows_are_blocks() {
        let rows = json!([
            {"name": "eth0", "ifindex": 2, "pods": false, "conflicts": [], "why": "carries 192.0.2.1/24",
             "at_ingress": [{"name": "ingress_stub", "own": true}, {"name": "", "own": false}]},
            {"name": "no", "inner": {"a": [1, 2]}},
        ]);
        let wanted = "- at_ingress:\n  - name: ingress_stub\n    own: true\n  - name: \"\"\n    own: false\n  \
                      conflicts: []\n  ifindex: 2\n  name: eth0\n  pods: false\n  why: \"carries 192.0.2.1/24\"\n\
                      - inner:\n    a:\n    - 1\n    - 2\n  name: \"no\"\n";
        assert_eq!(document(&rows), wanted);
        assert_eq!(document(&json!([])), "[]\n");
    }
}
