using System.Globalization;
using System.Net;

namespace MiniCpmNative.Engine.Report;

/// <summary>Pieces of a page.</summary>
internal static class Html
{
    /// <summary>
    /// Any text as the content of an element or attribute. Control characters have no place in a
    /// page, line ends and tabs aside.
    /// </summary>
    public static string Text(string text) => WebUtility.HtmlEncode(
        new string([.. text.Select(c =>
            char.IsControl(c) && c is not ('\n' or '\t') ? '\uFFFD' : c)]));

    public static string Invariant(FormattableString text) =>
        text.ToString(CultureInfo.InvariantCulture);
}
