//! Compares what a program printed as JSON with a stored shape in `tests/golden/schema/`.
//!
//! The shapes are JSON Schema, of which this knows the words that they use and refuses every other: a word that is not
//! understood would check nothing. `$schema` says which language it is and is passed over.

use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Map, Value};

/// Fails, naming the place, unless `value` has the shape `tests/golden/schema/NAME.json`.
pub fn check(name: &str, value: &Value) -> Result<()> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("golden/schema").join(format!("{name}.json"));
    let text = std::fs::read_to_string(&path).with_context(|| path.display().to_string())?;
    let schema: Value = serde_json::from_str(&text).with_context(|| path.display().to_string())?;
    fits(&schema, value, "$").with_context(|| format!("{name} has not the shape {}: {value:#}", path.display()))
}

fn fits(schema: &Value, value: &Value, at: &str) -> Result<()> {
    let words = schema.as_object().with_context(|| format!("{at}: the shape is no object"))?;
    for (word, wanted) in words {
        match word.as_str() {
            "$schema" => {}
            "type" => ensure!(types(wanted)?.contains(&type_of(value)), "{at}: {value} is not {wanted}"),
            "enum" => {
                let known = wanted.as_array().context("enum wants a list")?;
                ensure!(known.contains(value), "{at}: {value} is none of {wanted}");
            }
            "items" => {
                for (index, item) in value.as_array().into_iter().flatten().enumerate() {
                    fits(wanted, item, &format!("{at}[{index}]"))?;
                }
            }
            "required" => {
                for name in wanted.as_array().context("required wants a list")? {
                    let name = name.as_str().context("required wants names")?;
                    ensure!(value.as_object().is_none_or(|object| object.contains_key(name)), "{at}: no {name}");
                }
            }
            "properties" => {
                let properties = wanted.as_object().context("properties wants an object")?;
                for (name, part) in value.as_object().into_iter().flatten() {
                    if let Some(shape) = properties.get(name) {
                        fits(shape, part, &format!("{at}.{name}"))?;
                    }
                }
            }
            "additionalProperties" => {
                ensure!(*wanted == Value::Bool(false), "additionalProperties can only be forbidden");
                no_others(words, value, at)?;
            }
            other => bail!("{at}: '{other}' in a shape would check nothing"),
        }
    }
    Ok(())
}

fn no_others(words: &Map<String, Value>, value: &Value, at: &str) -> Result<()> {
    let known = words.get("properties").and_then(Value::as_object).context("properties are missing")?;
    let unknown = value.as_object().into_iter().flatten().map(|(name, _)| name).find(|name| !known.contains_key(*name));
    ensure!(unknown.is_none(), "{at}: {unknown:?} is not in the shape");
    Ok(())
}

fn types(wanted: &Value) -> Result<Vec<&str>> {
    match wanted {
        Value::String(one) => Ok(vec![one]),
        Value::Array(some) => some.iter().map(|one| one.as_str().context("type wants names")).collect(),
        _ => bail!("type wants names"),
    }
}

fn type_of(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "boolean",
        Value::Number(number) if number.is_f64() => "number",
        Value::Number(_) => "integer",
        Value::String(_) => "string",
        Value::Array(_) => "array",
        Value::Object(_) => "object",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_shape_is_kept_to_the_letter() {
        let schema = json!({
            "type": "array",
            "items": {
                "type": "object", "required": ["a"], "additionalProperties": false,
                "properties": {"a": {"type": ["integer", "null"]}, "b": {"type": "string", "enum": ["x", "y"]}},
            },
        });
        for good in [json!([]), json!([{"a": 1}, {"a": null, "b": "y"}])] {
            fits(&schema, &good, "$").expect("fits");
        }
        for (bad, place) in [
            (json!({}), "$: "),
            (json!([{"a": 1.5}]), "$[0].a: "),
            (json!([{"a": 1}, {"b": "x"}]), "$[1]: no a"),
            (json!([{"a": 1, "b": "z"}]), "$[0].b: "),
            (json!([{"a": 1, "c": 1}]), "$[0]: Some(\"c\")"),
        ] {
            let error = fits(&schema, &bad, "$").expect_err("does not fit").to_string();
            assert!(error.starts_with(place), "{error}");
        }
        assert!(fits(&json!({"minimum": 1}), &json!(1), "$").is_err(), "an unknown word");
    }
}
