//! Draws latency over load as SVG: a panel for each load, a line for each of ours and theirs and for each percentile, a dot for
//! each depth. Latency is on a logarithmic scale: it spans three decades.

use std::fmt::Write;

use super::sweep::{LOADS, Point};

/// Of one panel, without its margins.
const WIDTH: f64 = 430.0;
const HEIGHT: f64 = 330.0;
/// For the labels of axes.
const LEFT: f64 = 70.0;
const TOP: f64 = 50.0;
const BOTTOM: f64 = 95.0;
const RIGHT: f64 = 25.0;
/// Marks on the axis of load, about.
const MARKS: f64 = 5.0;

/// Index into [`super::figures::PERCENTILES`], and how it is drawn.
const LINES: [(usize, &str, &str); 2] = [(0, "median", ""), (2, "p99", "6 4")];
const COLOURS: [(bool, &str, &str); 2] =
    [(true, "sheep, three copies", "#1f6feb"), (false, "qemu-nbd, one copy", "#d1691c")];

/// Where a panel's values lie on it.
struct Scale {
    left: f64,
    load_max: f64,
    /// Decades.
    low: f64,
    high: f64,
}

impl Scale {
    fn of(left: f64, points: &[&Point]) -> Scale {
        let latencies = || points.iter().flat_map(|point| LINES.map(|(index, _, _)| point.figures.latency_us[index]));
        let low = latencies().fold(f64::INFINITY, f64::min).max(1.0).log10().floor();
        let high = latencies().fold(10.0, f64::max).log10().ceil().max(low + 1.0);
        let load_max = points.iter().map(|point| point.figures.per_second).fold(1.0, f64::max) * 1.05;
        Scale { left, load_max, low, high }
    }

    fn x(&self, per_second: f64) -> f64 {
        self.left + per_second / self.load_max * WIDTH
    }

    fn y(&self, latency_us: f64) -> f64 {
        TOP + HEIGHT * (1.0 - (latency_us.max(1.0).log10() - self.low) / (self.high - self.low))
    }

    /// Distance of marks on the axis of load: 1, 2 or 5 of some decade.
    fn step(&self) -> f64 {
        let rough = self.load_max / MARKS;
        let decade = 10_f64.powf(rough.log10().floor());
        [1.0, 2.0, 5.0, 10.0].map(|digit| digit * decade).into_iter().find(|step| *step >= rough).unwrap_or(rough)
    }
}

fn text(svg: &mut String, x: f64, y: f64, attributes: &str, words: &str) {
    let _ = writeln!(svg, r#"<text x="{x:.1}" y="{y:.1}" {attributes}>{words}</text>"#);
}

fn line(svg: &mut String, from: (f64, f64), to: (f64, f64), attributes: &str) {
    let ((x1, y1), (x2, y2)) = (from, to);
    let _ = writeln!(svg, r#"<line x1="{x1:.1}" y1="{y1:.1}" x2="{x2:.1}" y2="{y2:.1}" {attributes}/>"#);
}

fn latency_shown(decade: f64) -> String {
    let us = 10_f64.powf(decade);
    if us >= 1e6 {
        format!("{:.0} s", us / 1e6)
    } else if us >= 1e3 {
        format!("{:.0} ms", us / 1e3)
    } else {
        format!("{us:.0} us")
    }
}

fn axes(svg: &mut String, scale: &Scale, title: &str) {
    let (left, right, bottom) = (scale.left, scale.left + WIDTH, TOP + HEIGHT);
    text(svg, left + WIDTH / 2.0, TOP - 18.0, r#"text-anchor="middle" font-weight="bold""#, title);
    let mut decade = scale.low;
    while decade <= scale.high {
        let y = scale.y(10_f64.powf(decade));
        line(svg, (left, y), (right, y), r##"stroke="#ddd""##);
        text(svg, left - 8.0, y + 4.0, r#"text-anchor="end""#, &latency_shown(decade));
        decade += 1.0;
    }
    let mut load = 0.0;
    while load <= scale.load_max {
        let x = scale.x(load);
        line(svg, (x, bottom), (x, bottom + 5.0), r##"stroke="#333""##);
        text(svg, x, bottom + 20.0, r#"text-anchor="middle""#, &format!("{load:.0}"));
        load += scale.step();
    }
    line(svg, (left, TOP), (left, bottom), r##"stroke="#333""##);
    line(svg, (left, bottom), (right, bottom), r##"stroke="#333""##);
    text(svg, left + WIDTH / 2.0, bottom + 40.0, r#"text-anchor="middle""#, "requests per second");
    let (x, y) = (left - 55.0, TOP + HEIGHT / 2.0);
    text(svg, x, y, &format!(r#"text-anchor="middle" transform="rotate(-90 {x:.1} {y:.1})""#), "latency");
}

fn curves(svg: &mut String, scale: &Scale, points: &[&Point]) {
    for (is_ours, _, colour) in COLOURS {
        for (percentile, _, dashes) in LINES {
            let of = || points.iter().filter(|point| point.is_ours == is_ours);
            let place =
                |point: &Point| (scale.x(point.figures.per_second), scale.y(point.figures.latency_us[percentile]));
            let path: Vec<String> = of()
                .map(|point| {
                    let (x, y) = place(point);
                    format!("{x:.1},{y:.1}")
                })
                .collect();
            let path = path.join(" ");
            let _ = writeln!(
                svg,
                r#"<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.5" stroke-dasharray="{dashes}"/>"#
            );
            for point in of() {
                let (x, y) = place(point);
                let _ = writeln!(svg, r#"<circle cx="{x:.1}" cy="{y:.1}" r="2.5" fill="{colour}"/>"#);
                if percentile == 0 {
                    let small = format!(r#"font-size="9" fill="{colour}""#);
                    text(svg, x + 4.0, y + 11.0, &small, &point.depth.to_string());
                }
            }
        }
    }
}

fn legend(svg: &mut String, y: f64) {
    let mut x = LEFT;
    for (_, who, colour) in COLOURS {
        for (_, what, dashes) in LINES {
            let drawn = format!(r#"stroke="{colour}" stroke-width="2" stroke-dasharray="{dashes}""#);
            line(svg, (x, y - 4.0), (x + 30.0, y - 4.0), &drawn);
            text(svg, x + 36.0, y, "", &format!("{who}: {what}"));
            x += 220.0;
        }
    }
}

/// The whole picture.
pub fn svg(points: &[Point]) -> String {
    let panel = LEFT + WIDTH + RIGHT;
    let (width, height) = (panel * LOADS.len() as f64, TOP + HEIGHT + BOTTOM);
    let mut svg = format!(
        r#"<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0}" height="{height:.0}" font-family="sans-serif" font-size="12">"#
    );
    svg.push('\n');
    let _ = writeln!(svg, r#"<rect width="{width:.0}" height="{height:.0}" fill="white"/>"#);
    for (index, (title, _)) in LOADS.iter().enumerate() {
        let here: Vec<&Point> = points.iter().filter(|point| point.load == index).collect();
        let scale = Scale::of(LEFT + panel * index as f64, &here);
        axes(&mut svg, &scale, title);
        curves(&mut svg, &scale, &here);
    }
    legend(&mut svg, height - 30.0);
    text(&mut svg, LEFT, height - 10.0, r##"font-size="10" fill="#555""##, "Numbers at dots: requests under way.");
    svg.push_str("</svg>\n");
    svg
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::figures::Figures;

    #[test]
    fn every_point_is_drawn_inside_the_picture() {
        let point = |load, is_ours, depth: usize| {
            let latency_us = [100.0 * depth as f64, 0.0, 900.0 * depth as f64, 0.0];
            let figures = Figures { per_second: 1000.0 * depth as f64, latency_us, ..Figures::default() };
            Point { load, is_ours, depth, figures }
        };
        let points: Vec<Point> =
            [1, 8, 64].iter().flat_map(|&depth| [point(0, true, depth), point(1, false, depth)]).collect();
        let drawn = svg(&points);
        assert_eq!(drawn.matches("<circle").count(), 2 * points.len());
        assert!(!drawn.contains("NaN") && !drawn.contains("inf"), "{drawn}");
        for part in drawn.split("cy=\"").skip(1) {
            let y: f64 = part.split('"').next().and_then(|text| text.parse().ok()).expect("a number");
            assert!((TOP..=TOP + HEIGHT).contains(&y), "{y}");
        }
    }
}
