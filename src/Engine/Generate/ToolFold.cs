using MiniCpmNative.Engine.Data.Text;

namespace MiniCpmNative.Engine.Generate;

/// <summary>
/// Takes the calls of functions out of an answer's text as it comes. What the template could not
/// have written stays text, as do calls among thoughts, which the model may only weigh.
/// </summary>
/// <param name="style">How the template writes calls.</param>
/// <param name="tools">Functions that may be called, each as templates write it.</param>
/// <param name="thinks">Whether the answer begins inside of thoughts.</param>
/// <param name="tell">Takes the text.</param>
/// <param name="call">Takes calls, between the texts around them.</param>
public sealed class ToolFold(ToolStyle style, IReadOnlyList<string> tools, bool thinks,
    Action<string> tell, Action<ToolCall> call)
{
    private static readonly string[] s_answering = [ToolStyle.CallStart, "<think>"],
        s_thinking = ["</think>"], s_calling = [ToolStyle.CallEnd];

    private string _held = "";
    private string[] _marks = thinks ? s_thinking : s_answering;

    /// <summary>Takes the next piece.</summary>
    public void Add(string piece)
    {
        _held += piece;
        while (TextMarks.Find(_held, _marks, out string mark) is >= 0 and var at)
        {
            int end = at + mark.Length;
            if (_marks == s_calling)
            {
                string text = _held[ToolStyle.CallStart.Length..at];
                if (style.Read(text, tools) is { } read)
                {
                    (_held, _marks) = (_held[end..], s_answering);
                    call(read);
                }
                else Tell(end, s_answering);
            }
            else if (mark == ToolStyle.CallStart) Tell(at, s_calling);
            else Tell(end, mark == "<think>" ? s_thinking : s_answering);
        }

        if (_marks != s_calling) Tell(_held.Length - TextMarks.Open(_held, _marks), _marks);
    }

    /// <summary>What is left, a call that never ended among it.</summary>
    public void End() => Tell(_held.Length, _marks);

    private void Tell(int length, string[] next)
    {
        string text = _held[..length];
        (_held, _marks) = (_held[length..], next);
        if (text.Length > 0) tell(text);
    }
}
