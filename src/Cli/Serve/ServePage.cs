using System.Reflection;
using Microsoft.AspNetCore.Http;

namespace MiniCpmNative.Cli.Serve;

/// <summary>The page at /, which the assembly carries.</summary>
internal static class ServePage
{
    public static byte[] Content { get; } = Read();

    public static Task SendBytes(this HttpResponse response, byte[] content)
    {
        response.ContentLength = content.Length;
        return response.Body.WriteAsync(content).AsTask();
    }

    private static byte[] Read()
    {
        using Stream page =
            Assembly.GetExecutingAssembly().GetManifestResourceStream("serve.html")!;
        using var all = new MemoryStream();
        page.CopyTo(all);
        return all.ToArray();
    }
}
