using System.Globalization;
using System.Text;

namespace MiniCpmNative.Engine.Train;

/// <summary>
/// Progress on the screen: in a terminal one line that is rewritten at most ten times a second,
/// else a plain line per log entry. No escape sequences: a line is overwritten with its successor
/// and blanks, and never reaches the last column, so that nothing wraps.
/// </summary>
internal sealed class Progress
{
    private const double DrawSeconds = 0.1;
    private const int WidestBar = 30;

    // Where the terminal echoes ^C behind the line.
    private const int EchoColumns = 2;

    private readonly TextWriter _output;
    private readonly bool _isTerminal;
    private readonly Func<int> _width;
    private readonly TimeProvider _clock;
    private readonly StringBuilder _line = new();
    private readonly Lock _turn = new();
    private long _started, _drawn;
    private int _shown, _first, _total;
    private double _smoothTokens, _smoothSeconds;

    public Progress(TextWriter output, bool isTerminal, Func<int> width, TimeProvider clock) =>
        (_output, _isTerminal, _width, _clock) = (output, isTerminal, width, clock);

    /// <summary>Time and remaining time count from here.</summary>
    public void Start(int stepsDone, int total)
    {
        (_first, _total) = (stepsDone, total);
        _started = _clock.GetTimestamp();
        _drawn = 0;
    }

    /// <summary>Seconds since the start.</summary>
    public double Elapsed => _clock.GetElapsedTime(_started).TotalSeconds;

    /// <summary>A line of its own, above the progress line.</summary>
    public void Message(string line)
    {
        lock (_turn)
        {
            Clear();
            _output.WriteLine(line);
        }
    }

    /// <summary>Takes a step into the speed, which is that of about the last ten steps.</summary>
    public void Count(in StepReport report)
    {
        _smoothTokens = (0.9 * _smoothTokens) + report.Tokens;
        _smoothSeconds = (0.9 * _smoothSeconds) + report.Seconds;
    }

    /// <summary>Draws when a drawing is due; allocates nothing when not.</summary>
    public void Step(in StepReport report)
    {
        if (!_isTerminal) return;
        bool due = _drawn == 0 || report.Step >= _total
            || _clock.GetElapsedTime(_drawn).TotalSeconds >= DrawSeconds;
        if (!due) return;
        lock (_turn)
        {
            _drawn = _clock.GetTimestamp();
            Draw(report);
        }
    }

    /// <summary>A plain line for a step that is logged, where there is no progress line.</summary>
    public void Logged(in StepReport report)
    {
        if (_isTerminal) return;
        lock (_turn)
        {
            _line.Clear().Append(CultureInfo.InvariantCulture, $"step {report.Step}/{_total}  ");
            Times(report.Step);
            Values(report);
            Flush(newLine: true);
        }
    }

    /// <summary>Leaves the progress line as it is and goes to the next one.</summary>
    public void End()
    {
        lock (_turn)
        {
            if (_shown > 0) _output.WriteLine();
            _shown = 0;
        }
    }

    // What matters most stands first: a narrow terminal cuts the end off,
    // a wide one gets a bar too.
    private void Draw(in StepReport report)
    {
        double share = _total == 0 ? 1 : (double)report.Step / _total;
        _line.Clear().Append(
            CultureInfo.InvariantCulture, $"{Math.Floor(share * 100),3}% {report.Step}/{_total}  ");
        int head = _line.Length, most = Columns - EchoColumns;
        Times(report.Step);
        int values = _line.Length;
        Values(report);
        if (_line.Length > most)
        {
            _line.Length = values;
            ShortValues(report);
        }

        int bar = Math.Min(WidestBar, most - _line.Length - 4);
        if (bar >= 5)
        {
            int full = (int)(share * bar);
            _line.Insert(head, "]  ").Insert(head, ".", bar - full).Insert(head, "#", full)
                .Insert(head, "[");
        }

        if (_line.Length > most) _line.Length = most;
        int length = _line.Length;
        int blanks = Math.Min(_shown, Columns) - length;
        if (blanks > 0) _line.Append(' ', blanks).Append('\b', blanks);
        _line.Insert(0, '\r');
        _shown = length;
        Flush(newLine: false);
    }

    // The last column stays free: writing to it would wrap the line on some terminals.
    private int Columns => Math.Max(20, _width() - 1);

    private void Values(in StepReport r)
    {
        _line.Append(
            CultureInfo.InvariantCulture,
            $"loss {r.Loss:0.0000}  grad_norm {r.GradNorm:0.000}  lr {r.LearningRate:0.00e-00}  ");
        _line.Append(
            CultureInfo.InvariantCulture, $"{Speed:N0} tokens/s  {Gib(r):0.00} GiB");
    }

    // The same in fewer columns, so that 80 hold all of it.
    private void ShortValues(in StepReport r)
    {
        _line.Append(
            CultureInfo.InvariantCulture,
            $"loss {r.Loss:0.000} norm {r.GradNorm:0.00} lr {r.LearningRate:0.0e-0} ");
        _line.Append(CultureInfo.InvariantCulture, $"{Speed:0} tok/s {Gib(r):0.0} GiB");
    }

    private double Speed => _smoothSeconds > 0 ? _smoothTokens / _smoothSeconds : 0;

    private static double Gib(in StepReport report) => (double)report.MemoryBytes / (1 << 30);

    private void Times(int step)
    {
        double elapsed = Elapsed;
        double left = elapsed / Math.Max(1, step - _first) * (_total - step);
        Time(elapsed);
        _line.Append('<');
        Time(left);
        _line.Append("  ");
    }

    private void Time(double seconds)
    {
        long whole = (long)Math.Min(seconds, 1e12);
        if (whole >= 3600)
        {
            _line.Append(
                CultureInfo.InvariantCulture,
                $"{whole / 3600}:{whole / 60 % 60:00}:{whole % 60:00}");
        }
        else
        {
            _line.Append(CultureInfo.InvariantCulture, $"{whole / 60}:{whole % 60:00}");
        }
    }

    private void Clear()
    {
        if (_shown == 0) return;
        int blanks = Math.Min(_shown + EchoColumns, Columns);
        _line.Clear().Append('\r').Append(' ', blanks).Append('\r');
        _shown = 0;
        Flush(newLine: false);
    }

    private void Flush(bool newLine)
    {
        if (newLine) _line.Append('\n');
        _output.Write(_line);
        _output.Flush();
    }
}
