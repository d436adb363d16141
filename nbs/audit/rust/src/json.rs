//! Just enough of JSON to print figures.

use std::fmt;

pub enum Json {
    Whole(usize),
    Number(f64),
    Text(String),
    List(Vec<Json>),
    Object(Vec<(String, Json)>),
}

impl Json {
    /// An object from pairs of a name and a value, in their order.
    pub fn object<N: ToString, V: Into<Json>>(pairs: impl IntoIterator<Item = (N, V)>) -> Json {
        Json::Object(
            pairs
                .into_iter()
                .map(|(n, v)| (n.to_string(), v.into()))
                .collect(),
        )
    }
}

impl From<usize> for Json {
    fn from(value: usize) -> Json {
        Json::Whole(value)
    }
}

impl From<f64> for Json {
    fn from(value: f64) -> Json {
        assert!(value.is_finite(), "JSON has no {value}");
        Json::Number(value)
    }
}

impl From<&str> for Json {
    fn from(value: &str) -> Json {
        Json::Text(value.to_string())
    }
}

impl<V: Into<Json>> From<Vec<V>> for Json {
    fn from(values: Vec<V>) -> Json {
        Json::List(values.into_iter().map(Into::into).collect())
    }
}

/// Write the parts with commas between them.
fn join<T>(
    f: &mut fmt::Formatter,
    parts: &[T],
    mut write: impl FnMut(&mut fmt::Formatter, &T) -> fmt::Result,
) -> fmt::Result {
    for (i, part) in parts.iter().enumerate() {
        if i > 0 {
            f.write_str(", ")?;
        }
        write(f, part)?;
    }
    Ok(())
}

impl fmt::Display for Json {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Json::Whole(value) => write!(f, "{value}"),
            Json::Number(value) => write!(f, "{value:.4}"),
            Json::Text(value) => {
                assert!(!value.contains(['"', '\\']) && !value.contains(char::is_control));
                write!(f, "\"{value}\"")
            }
            Json::List(values) => {
                f.write_str("[")?;
                join(f, values, |f, value| write!(f, "{value}"))?;
                f.write_str("]")
            }
            Json::Object(pairs) => {
                f.write_str("{")?;
                join(f, pairs, |f, (name, value)| {
                    write!(f, "\"{name}\": {value}")
                })?;
                f.write_str("}")
            }
        }
    }
}
