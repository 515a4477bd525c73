using MiniCpmNative.Engine.Data.Text;
using MiniCpmNative.Engine.Generate;

namespace MiniCpmNative.Cli.Serve;

/// <summary>
/// The text of an answer as its tokens come: up to a stop text, of which nothing is told, not even
/// where only its beginning is there yet. Calls of functions are taken out before.
/// </summary>
internal sealed class RunningAnswer
{
    private readonly AnswerJob _job;
    private readonly TextStream _text;
    private readonly ToolFold? _calls;
    private string _held = "";
    private bool _stopped, _begun;

    public RunningAnswer(AnswerJob job, PromptFormat format)
    {
        (_job, _text) = (job, new TextStream(format.Tokenizer));
        if (job.Request.Tools.Count == 0 || format.Tools is not { } style) return;
        _calls = new ToolFold(style, job.Request.Tools,
            thinks: job.Request.Thinks && format.OpensThoughts, Say, Call);
        _calls.Add(job.Request.Begun(format));
    }

    /// <summary>False when it is over.</summary>
    public bool Take(int id)
    {
        _job.Tokens++;
        Add(_text.Add(id));
        return !_stopped && _job.Tokens < _job.MaxTokens && !_job.Gone.IsCancellationRequested;
    }

    /// <param name="ended">Whether the model ended it.</param>
    public void End(bool ended)
    {
        Add(_text.End());
        _calls?.End();
        if (!_stopped) _job.Tell(_held.TrimEnd());
        _job.End(cut: !ended && !_stopped);
    }

    private void Add(string piece)
    {
        if (_calls is null) Say(piece);
        else _calls.Add(piece);
    }

    private void Call(ToolCall call)
    {
        if (_stopped) return;
        _job.Calls.Add(call);
        if (_job.Request.CallsSeveral) return;
        _job.Tell(_held.TrimEnd());
        _stopped = true;
    }

    private void Say(string piece)
    {
        if (_stopped) return;
        _held += _begun ? piece : piece.TrimStart();
        _begun |= _held.Length > 0;
        int stop = TextMarks.Find(_held, _job.Request.Stops, out _);
        _stopped = stop >= 0;
        int told = _stopped ? stop : _held.Length - TextMarks.Open(_held, _job.Request.Stops);
        // White space is held back: at the end there is none.
        int end = _held.AsSpan(0, told).TrimEnd().Length;
        _job.Tell(_held[..end]);
        _held = _held[end..];
    }
}
