//! What a command hands back: data to print, and the exit code it means.
//!
//! Commands never print their results; `main` does, once, when the command has ended. What goes wrong on the way goes to
//! standard error at once, so it always precedes the results.

use jiff::tz::TimeZone;

use crate::exit::Exit;

/// How and where results are printed.
#[derive(Clone, Debug)]
pub struct Style {
    /// For moments of time.
    pub zone: TimeZone,
    /// Whether standard output is a terminal.
    pub is_terminal: bool,
}

/// Data that knows its forms. All texts end with a newline, except where bytes are printed as they are.
pub trait Show {
    /// For people.
    fn table(&self, style: &Style, out: &mut Vec<u8>);

    /// For scripts: bare values. The same as for people where a command has no such form.
    fn raw(&self, style: &Style, out: &mut Vec<u8>) {
        self.table(style, out);
    }

    /// For programs. `None` where a command has no such form.
    fn json(&self) -> Option<serde_json::Value> {
        None
    }
}

/// The form that was asked for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Form {
    /// For people.
    Table,
    /// For scripts.
    Raw,
    /// For programs.
    Json,
}

impl Form {
    /// The form that `-r` and `--json` ask for.
    pub fn of(raw: bool, json: bool) -> Form {
        match (raw, json) {
            (_, true) => Form::Json,
            (true, false) => Form::Raw,
            (false, false) => Form::Table,
        }
    }
}

/// See the module.
pub struct Report {
    shown: Option<(Form, Box<dyn Show>)>,
    /// The exit code of a command that came to its end.
    pub exit: Exit,
}

impl Report {
    /// Done, nothing to say.
    pub fn silent() -> Report {
        Report { shown: None, exit: Exit::Success }
    }

    /// Done, with data.
    pub fn new(form: Form, data: impl Show + 'static) -> Report {
        Report { shown: Some((form, Box::new(data))), exit: Exit::Success }
    }

    /// Done, with a text for people.
    pub fn text(text: impl Into<Vec<u8>>) -> Report {
        Report::new(Form::Table, Text(text.into()))
    }

    /// The same, with another exit code.
    #[must_use]
    pub fn exits(mut self, exit: Exit) -> Report {
        self.exit = exit;
        self
    }

    /// The bytes for standard output.
    pub fn print(&self, style: &Style) -> Vec<u8> {
        let mut out = Vec::new();
        if let Some((form, data)) = &self.shown {
            match form {
                Form::Table => data.table(style, &mut out),
                Form::Raw => data.raw(style, &mut out),
                Form::Json => {
                    let json = data.json().expect("only commands with a JSON form have the option");
                    out = serde_json::to_vec_pretty(&json).expect("a JSON value can be written");
                    out.push(b'\n');
                }
            }
        }
        out
    }
}

struct Text(Vec<u8>);

impl Show for Text {
    fn table(&self, _: &Style, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.0);
    }
}
