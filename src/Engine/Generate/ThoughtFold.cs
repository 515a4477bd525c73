namespace MiniCpmNative.Engine.Generate;

/// <summary>
/// Takes the thoughts in front of an answer, &lt;think&gt; to &lt;/think&gt;, out of its text as it
/// comes, and white space in front of what is left.
/// </summary>
public sealed class ThoughtFold
{
    private const string Open = "<think>", Close = "</think>";

    private enum State
    {
        Undecided,
        Thinking,
        Thought,
        Answering,
    }

    private string _held = "";
    private State _state;

    /// <summary>Whether it is inside of thoughts now.</summary>
    public bool IsThinking => _state == State.Thinking;

    /// <summary>What is to be shown of the next piece.</summary>
    public string Add(string piece)
    {
        if (_state == State.Answering) return piece;
        _held += piece;
        if (_state == State.Undecided)
        {
            _held = _held.TrimStart();
            if (_held.Length < Open.Length && Open.StartsWith(_held, StringComparison.Ordinal))
                return "";
            if (!_held.StartsWith(Open, StringComparison.Ordinal)) return End();
            _state = State.Thinking;
        }

        if (_state == State.Thinking)
        {
            int close = _held.IndexOf(Close, StringComparison.Ordinal);
            if (close < 0) return "";
            _held = _held[(close + Close.Length)..];
            _state = State.Thought;
        }

        _held = _held.TrimStart();
        return _held.Length == 0 ? "" : End();
    }

    /// <summary>What is left: nothing of thoughts that never ended.</summary>
    public string End()
    {
        string rest = _state == State.Thinking ? "" : _held;
        (_state, _held) = (State.Answering, "");
        return rest;
    }
}
